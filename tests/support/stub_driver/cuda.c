// Replaces libcuda.so.1 in tests of launches: it checks each launch as the driver does, and records it, but runs none.
#include <cuda.h>
#include <string.h>

#define MAX_PARAMETERS 64
#define DEFAULT_SHARED (48 << 10)

typedef struct {
  char name[256];
  int allowed_shared;
} Function;

// The last launch, for the test to read. parameters: the first 8 bytes, or fewer, of each.
struct {
  long count;
  unsigned grid[3], block[3], shared, attributes;
  unsigned long long stream, function, parameters[MAX_PARAMETERS];
} launched;

// Called after each launch, with its parameters; NULL: not called.
void (*arrived)(void** parameters);

// What the test sets: whether there are clusters, the limit of a block's shared memory, and the sizes of the next
// launch's parameters.
int clusters = 1, shared_limit = 99 << 10, shared_of_multiprocessor = 100 << 10;
int parameter_count, parameter_sizes[MAX_PARAMETERS];

static Function functions[1 << 14];
static int function_count;
static const char* reason = "no error";

static CUresult refuse(const char* why) {
  reason = why;
  return CUDA_ERROR_INVALID_VALUE;
}

const char* name_of(unsigned long long function) { return ((Function*)function)->name; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error ? reason : "no error";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_of_multiprocessor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 128; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)data = pointer, CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (function_count == sizeof functions / sizeof *functions) return refuse("the stub holds no more functions");
  Function* f = &functions[function_count++];
  strncpy(f->name, name, sizeof f->name - 1);
  f->allowed_shared = DEFAULT_SHARED;
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > shared_limit) return refuse("more shared memory than a block may opt in to");
  ((Function*)function)->allowed_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return *count = 1, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ) return refuse("an empty grid");
  if (c->gridDimX > 2147483647u || c->gridDimY > 65535 || c->gridDimZ > 65535) return refuse("too large a grid");
  if (c->blockDimX * c->blockDimY * c->blockDimZ > 1024) return refuse("too many threads");
  if (c->sharedMemBytes > (unsigned)((Function*)function)->allowed_shared) return refuse("shared memory: no opt-in");
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    const CUlaunchAttributeValue* value = &c->attrs[i].value;
    const unsigned x = value->clusterDim.x, y = value->clusterDim.y, z = value->clusterDim.z;
    if (!clusters) return refuse("no clusters on this GPU");
    if (!x || !y || !z || x * y * z > 8) return refuse("a cluster of a wrong size");
    if (c->gridDimX % x || c->gridDimY % y || c->gridDimZ % z) return refuse("the grid is not of whole clusters");
  }
  launched.count++;
  launched.grid[0] = c->gridDimX, launched.grid[1] = c->gridDimY, launched.grid[2] = c->gridDimZ;
  launched.block[0] = c->blockDimX, launched.block[1] = c->blockDimY, launched.block[2] = c->blockDimZ;
  launched.shared = c->sharedMemBytes, launched.attributes = c->numAttrs;
  launched.stream = (unsigned long long)c->hStream, launched.function = (unsigned long long)function;
  memset(launched.parameters, 0, sizeof launched.parameters);
  for (int i = 0; i < parameter_count; ++i) memcpy(&launched.parameters[i], parameters[i], parameter_sizes[i]);
  if (arrived) arrived(parameters);
  return CUDA_SUCCESS;
}
