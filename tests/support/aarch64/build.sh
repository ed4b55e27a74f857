#!/usr/bin/env bash
# Into build/aarch64: inr_kernels._C, cross-compiled for aarch64, and `python`, a Python of that processor, from Debian's
# packages, that qemu runs. Needs Debian with g++-aarch64-linux-gnu and qemu-user; nothing of the system changes.
set -euo pipefail
cd "$(dirname "$0")/../../.."
for tool in apt-get aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v $tool > /dev/null || {
    echo "make aarch64 needs Debian with g++-aarch64-linux-gnu and qemu-user installed; there is no $tool" >&2
    exit 1
  }
done
build=$PWD/build/aarch64 sysroot=$PWD/build/aarch64/sysroot

if [ ! -e "$build/python" ]; then
  rm -rf "$sysroot" "$build/apt"
  mkdir -p "$sysroot" "$build/apt/lists"
  touch "$build/apt/status"
  options=(-q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=
    -o Dir::State::lists="$build/apt/lists" -o Dir::State::status="$build/apt/status" -o Dir::Cache="$build/apt")
  apt-get "${options[@]}" update
  python=$(apt-cache "${options[@]}" depends python3-minimal | grep -o 'python3\.[0-9]*' | head -n 1)
  libraries=$(apt-cache "${options[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances "$python-minimal" "lib$python-stdlib" libstdc++6 | grep '^\(lib\|zlib\)')
  (cd "$build/apt" && apt-get "${options[@]}" download "$python-minimal" "lib$python-dev" $libraries)
  for package in "$build"/apt/*.deb; do dpkg-deb -x "$package" "$sysroot"; done
  mv "$sysroot/usr/include/aarch64-linux-gnu/$python/pyconfig.h" "$sysroot/usr/include/$python/"
  printf '#!/bin/sh\nexec qemu-aarch64 -L %q %q "$@"\n' "$sysroot" "$sysroot/usr/bin/$python" > "$build/python"
  chmod +x "$build/python"
fi

PATH=$PWD/.venv/bin:$PATH
cmake -S . -B "$build/native" -GNinja -DINR_CUDA=0 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPython_EXECUTABLE="$build/python" \
  -DPython_INCLUDE_DIR="$(echo "$sysroot"/usr/include/python3.*)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)"
cmake --build "$build/native"
