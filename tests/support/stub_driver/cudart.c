// Replaces the CUDA runtime below host code that nvcc compiled: each call becomes one of cuda.c's driver.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

#define MAX_KERNELS 1024

// What the test sets: the call that fails, and its error.
const char* failing = "";
int failure;

static struct {
  const void* host;
  CUfunction function;
} kernels[MAX_KERNELS];
static int kernel_count;

static int fails(const char* call) { return strcmp(call, failing) == 0; }

static CUfunction function_of(const void* host) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == host) return kernels[i].function;
  return NULL;
}

// What the constructors of an object file call.
void** __cudaRegisterFatBinary(void* binary) { return binary; }
void __cudaRegisterFatBinaryEnd(void** module) {}
void __cudaUnregisterFatBinary(void** module) {}
void __cudaRegisterFunction(void** module, const char* host, char* device, const char* name, int threads, void* thread,
                            void* block, void* block_size, void* grid_size, int* warp_size) {
  if (kernel_count == MAX_KERNELS) return;  // a launch of the kernel fails
  kernels[kernel_count].host = host;
  cuModuleGetFunction(&kernels[kernel_count++].function, (CUmodule)module, name);
}

// Of kernel<<<...>>>(...), which csrc/cuda does not use.
cudaError_t __cudaGetKernel(void* kernel, const void* host) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared, void* stream) {
  return cudaErrorNotSupported;
}

cudaError_t cudaGetDevice(int* device) {
  if (fails(__func__)) return failure;
  return *device = 0, cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  if (fails(__func__)) return failure;
  return (cudaError_t)cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device);
}
cudaError_t cudaFuncSetAttribute(const void* host, enum cudaFuncAttribute attribute, int value) {
  const CUfunction function = function_of(host);
  if (fails(__func__)) return failure;
  if (!function) return cudaErrorInvalidDeviceFunction;
  return (cudaError_t)cuFuncSetAttribute(function, (CUfunction_attribute)attribute, value);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** parameters) {
  const CUfunction function = function_of(host);
  if (fails(__func__)) return failure;
  if (!function) return cudaErrorInvalidDeviceFunction;
  const dim3 grid = c->gridDim, block = c->blockDim;
  const CUlaunchConfig config = {grid.x, grid.y, grid.z, block.x, block.y, block.z, (unsigned)c->dynamicSmemBytes,
                                 c->stream, (CUlaunchAttribute*)c->attrs, c->numAttrs};
  return (cudaError_t)cuLaunchKernelEx(&config, function, parameters, NULL);
}

const char* cudaGetErrorString(cudaError_t error) {
  const char* text;
  switch (error) {
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    default: cuGetErrorString((CUresult)error, &text); return text;
  }
}
