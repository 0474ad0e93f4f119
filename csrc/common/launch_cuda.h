// How a CUDA kernel is launched, and what is checked around it. Kernels are launched through MRA_LAUNCH alone, so that
// one place decides what a launch is.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mra::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current for one scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace mra::cuda

#define MRA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  do {                                                             \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__);    \
    ::mra::cuda::check(cudaGetLastError(), "launch of " #kernel);  \
  } while (0)
