// What device code and launches, as the stand-in headers have them, ask of the engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda_simulator/vector_types.h"

namespace cuda_simulator {

// Ends the launch, with an error that says which rule of the programming model was broken, and by which thread.
[[noreturn]] void fail(const std::string& what);

// An operation that several threads meet in, and the line of the source where one thread does.
struct Place {
  const char* operation;
  const char* file;
  int line;
};

// A barrier of the block. Returns for how many of its threads `predicate` holds.
int block_barrier(bool predicate, Place place);

enum class Collective { kSync, kShuffle, kBallot, kGather };

// The lanes in `mask` meet. Returns nothing, the `value` of lane `source`, or a bit for each lane whose value is not 0.
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, Place place);

// The lanes of a whole warp meet and see one another's `count` words, at lane * count + i of what is returned, until
// the warp's next gather.
const uint64_t* warp_gather(const uint64_t* words, int count, Place place);

// Of the calling thread, in its warp.
int lane();

// The block's variable that `key` identifies: every byte 0xff (NaN) at first, aligned to `alignment` and no better.
void* shared_variable(const void* key, size_t bytes, size_t alignment);
// The launch's dynamic shared memory, likewise.
void* dynamic_shared_memory(size_t alignment);

// cp.async of `bytes` bytes, the last `zero_bytes` of them zeros. It lands when it is issued or when it is waited for,
// whichever the order of the launch says.
void async_copy(void* target, const void* source, size_t bytes, size_t zero_bytes);
void async_commit();
// Until at most the last `groups` committed groups are on their way.
void async_wait(size_t groups);

void count_atomic();

// What the device says that it has.
int multiprocessors();

// What a launch may ask for. Below, as on a GPU of compute capability 9.0.
constexpr size_t kStaticSharedBytes = 48 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;
void allow_dynamic_shared_memory(const void* kernel, size_t bytes);

// Runs `thread` once for every thread of every block, or leaves an error.
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& thread);

// CUDA's number of the error that a launch left, 0 for none; `clear` forgets it.
int launch_error(bool clear);
// What the last launch that failed did wrong.
const char* failure();

// A kernel with its launch configuration; the call with its arguments launches it.
template <class... Parameters>
struct Launch {
  const char* name;
  void (*kernel)(Parameters...);
  dim3 grid, block;
  size_t shared_bytes;

  void operator()(Parameters... arguments) const {
    launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { kernel(arguments...); });
  }
};

template <class... Parameters>
Launch<Parameters...> configure(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                size_t shared_bytes = 0, const void* /*stream*/ = nullptr) {
  return {name, kernel, grid, block, shared_bytes};
}

template <class T>
using Type = T;

constexpr size_t alignment_of(size_t type, size_t declared) { return type > declared ? type : declared; }

}  // namespace cuda_simulator

// What `translate.py` writes in place of kernel<<<grid, block, ...>>>, __shared__ and extern __shared__.
#define CUDA_SIMULATOR_LAUNCH(kernel, ...) ::cuda_simulator::configure(#kernel, kernel, __VA_ARGS__)
#define CUDA_SIMULATOR_SHARED(name, alignment, ...)                                                  \
  static char name##_key;                                                                            \
  auto& name = *static_cast<::cuda_simulator::Type<__VA_ARGS__>*>(::cuda_simulator::shared_variable( \
      &name##_key, sizeof(__VA_ARGS__), ::cuda_simulator::alignment_of(alignof(__VA_ARGS__), alignment)))
#define CUDA_SIMULATOR_DYNAMIC_SHARED(name, alignment, ...) \
  auto* name = static_cast<__VA_ARGS__*>(                   \
      ::cuda_simulator::dynamic_shared_memory(::cuda_simulator::alignment_of(alignof(__VA_ARGS__), alignment)))
