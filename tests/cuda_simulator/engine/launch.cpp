// Launches, and what Python controls of them.
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "engine.h"

extern dim3 blockDim, gridDim;

namespace cuda_simulator {

namespace {

// The numbers of cudaErrorInvalidValue, cudaErrorInvalidConfiguration and cudaErrorLaunchFailure.
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;

std::mutex one_launch_at_a_time;

int check(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool block_fits = threads > 0 && threads <= kMaxThreads && block.z <= 64;
  const bool grid_fits =
      grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
  if (!block_fits || !grid_fits) return kInvalidConfiguration;
  size_t allowed = kStaticSharedBytes;
  for (const auto& [known, bytes] : engine.allowed_dynamic_bytes) {
    if (known == kernel) allowed = std::max(allowed, bytes);
  }
  return shared_bytes <= std::min(allowed, kMaxSharedBytes) ? 0 : kInvalidValue;
}

// Stacks are reserved once, each above a page that may not be touched.
void make_fibers(size_t count) {
  constexpr size_t kGuard = 4096;
  for (std::vector<Fiber>& fibers : engine.fiber_sets) {
    while (fibers.size() < count) {
      void* memory = mmap(nullptr, kGuard + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, kGuard, PROT_NONE);
      fibers.emplace_back();
      fibers.back().stack = static_cast<char*>(memory) + kGuard;
    }
  }
}

// Leaves the engine ready for the next launch, also after an Error.
struct EndOfBlock {
  ~EndOfBlock() { free_shared_memory(); }
};

void run_blocks(uint64_t first, uint64_t count) {
  const Order order = engine.settings.order;
  std::vector<uint64_t> shuffled(order == Order::kRandom ? count : 0);
  std::iota(shuffled.begin(), shuffled.end(), first);
  std::shuffle(shuffled.begin(), shuffled.end(), engine.random);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t b = order == Order::kRandom ? shuffled[i] : first + (order == Order::kReverse ? count - 1 - i : i);
    const EndOfBlock end;
    run_block({static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
               static_cast<unsigned>(b / gridDim.x / gridDim.y)});
  }
}

}  // namespace

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  engine.launch_error = check(kernel, grid, block, shared_bytes);
  if (engine.launch_error != 0) return;
  engine.kernel = name;
  while (engine.kernel.front() == '(') engine.kernel = engine.kernel.substr(1, engine.kernel.size() - 2);
  engine.body = &thread;
  engine.dynamic_bytes = shared_bytes;
  engine.broken.clear();
  engine.random.seed(engine.settings.seed);
#if defined(CUDA_SIMULATOR_TSAN)
  engine.host.tsan = __tsan_get_current_fiber();
#endif
  make_fibers(size_t{block.x} * block.y * block.z);
  release(&engine.launched);
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t count = std::min(engine.settings.last_blocks, blocks);
  try {
    run_blocks(blocks - count, count);
  } catch (const Error& error) {
    engine.failure = error.what();
    engine.launch_error = kLaunchFailure;
    for (int i = 0; i < engine.threads; ++i) engine.fibers[i].sanitized.forget();
  }
  acquire(&engine.end_of_thread);
  ++engine.statistics.launches;
}

const char* failure() { return engine.failure.c_str(); }

int launch_error(bool clear) {
  const int error = engine.launch_error;
  if (clear) engine.launch_error = 0;
  return error;
}

int multiprocessors() { return engine.settings.multiprocessors; }

void allow_dynamic_shared_memory(const void* kernel, size_t bytes) {
  engine.allowed_dynamic_bytes.emplace_back(kernel, bytes);
}

}  // namespace cuda_simulator

#define CUDA_SIMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_SIMULATOR_EXPORT void cuda_simulator_configure(int order, unsigned seed, uint64_t last_blocks,
                                                    int multiprocessors) {
  cuda_simulator::engine.settings = {static_cast<cuda_simulator::Order>(order), seed, last_blocks, multiprocessors};
}

CUDA_SIMULATOR_EXPORT void cuda_simulator_statistics(cuda_simulator::Statistics* out) {
  *out = cuda_simulator::engine.statistics;
}

// What went wrong since it was last asked, empty for nothing.
CUDA_SIMULATOR_EXPORT const char* cuda_simulator_failure() {
  static std::string failure;
  failure.swap(cuda_simulator::engine.failure);
  cuda_simulator::engine.failure.clear();
  return failure.c_str();
}
