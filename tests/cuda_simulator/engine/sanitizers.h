// What AddressSanitizer and ThreadSanitizer must be told about fibers and about memory that begins a new life.
#pragma once

#include <sys/mman.h>

#include <cstddef>

#if defined(CUDA_SIMULATOR_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif
#if defined(CUDA_SIMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace cuda_simulator {

// A fiber is one thread to ThreadSanitizer, whatever block it runs: that two blocks in a row are unordered shows only
// if they run on different ones.
#if defined(CUDA_SIMULATOR_TSAN)
constexpr int kFiberSets = 2;
#else
constexpr int kFiberSets = 1;
#endif

// One fiber as the sanitizers know it. The engine is compiled without ThreadSanitizer: its own accesses are no news.
struct SanitizedFiber {
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;

  // The last thread on this stack left only the frames of the engine that it stopped in.
  void begin([[maybe_unused]] char* memory, [[maybe_unused]] size_t size) {
    stack = memory;
    bytes = size;
    fake_stack = nullptr;
#if defined(CUDA_SIMULATOR_ASAN)
    constexpr size_t kEngineFrames = 4096;
    __asan_unpoison_memory_region(memory + size - kEngineFrames, kEngineFrames);
#endif
#if defined(CUDA_SIMULATOR_TSAN)
    if (tsan == nullptr) tsan = __tsan_create_fiber(0);
#endif
  }
  // After a launch that could not go on: frames that were never unwound are forgotten.
  void forget() {
#if defined(CUDA_SIMULATOR_ASAN)
    __asan_unpoison_memory_region(stack, bytes);
#endif
#if defined(CUDA_SIMULATOR_TSAN)
    mmap(const_cast<void*>(stack), bytes, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    __tsan_destroy_fiber(tsan);
    tsan = nullptr;
#endif
  }
};

// Around a switch. A switch orders nothing in time: only barriers do.
inline void before_switch([[maybe_unused]] SanitizedFiber& from, [[maybe_unused]] SanitizedFiber& to,
                          [[maybe_unused]] bool from_is_done) {
#if defined(CUDA_SIMULATOR_ASAN)
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
#if defined(CUDA_SIMULATOR_TSAN)
  constexpr unsigned kNoSync = 1;
  __tsan_switch_to_fiber(to.tsan, kNoSync);
#endif
}
// `previous` learns its stack: the first switch is the only time that the host's stack becomes known.
inline void after_switch([[maybe_unused]] SanitizedFiber& self, [[maybe_unused]] SanitizedFiber* previous) {
#if defined(CUDA_SIMULATOR_ASAN)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self.fake_stack, &stack, &bytes);
  if (previous != nullptr) previous->stack = stack, previous->bytes = bytes;
#endif
}

inline void release([[maybe_unused]] void* moment) {
#if defined(CUDA_SIMULATOR_TSAN)
  __tsan_release(moment);
#endif
}
inline void acquire([[maybe_unused]] void* moment) {
#if defined(CUDA_SIMULATOR_TSAN)
  __tsan_acquire(moment);
#endif
}

// While one lives, ThreadSanitizer takes no notice of library calls, and memory that is allocated has no history.
class Unwatched {
 public:
#if defined(CUDA_SIMULATOR_TSAN)
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace cuda_simulator
