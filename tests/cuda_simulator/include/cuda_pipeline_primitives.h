// Asynchronous copies into shared memory (cp.async).
#pragma once

#include "cuda_simulator/engine.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zero_bytes = 0) {
  cuda_simulator::async_copy(shared, global, bytes, zero_bytes);
}
inline void __pipeline_commit() { cuda_simulator::async_commit(); }
inline void __pipeline_wait_prior(size_t groups) { cuda_simulator::async_wait(groups); }
