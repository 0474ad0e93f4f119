// The state of a launch: one fiber for each thread of the block that runs.
#pragma once

#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"
#include "cuda_simulator/engine.h"
#include "sanitizers.h"

namespace cuda_simulator {

constexpr int kWarpSize = 32;
constexpr int kMaxGathered = 8;  // words of a lane
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

// In which order threads and blocks run, and when asynchronous copies land.
enum class Order : int {
  kForward,  // the lowest thread and block first; copies land as late as they may
  kReverse,  // the highest first; copies land at once
  kRandom,   // any, copies at either time
};

struct Settings {
  Order order = Order::kForward;
  unsigned seed = 0;
  uint64_t last_blocks = UINT64_MAX;  // how many blocks of a grid run: the last ones, counted with x innermost
  int multiprocessors = 4;
};

struct Statistics {
  uint64_t launches, blocks, barriers, collectives, copies, atomics;
};

// A launch that cannot go on. Thrown on the host's context, and caught in `launch`.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { kReady, kAtBarrier, kInWarp, kReturned };

struct Copy {
  char* target;
  size_t bytes;
  char data[16];
};

struct Fiber {
  Context context;
  SanitizedFiber sanitized;
  char* stack = nullptr;
  uint3 thread;
  int warp, lane;
  State state;
  // While it waits:
  Place place;
  bool predicate;   // at a barrier
  Collective kind;  // in its warp
  unsigned mask;
  uint64_t value, result;
  int source;
  const uint64_t* words;  // in a gather
  // Groups of asynchronous copies that have not landed; the last one is not committed yet.
  std::vector<std::vector<Copy>> copies;
};

struct Warp {
  int first, lanes;
  unsigned arrived;  // lanes that wait in a collective
  // What orders memory across __syncwarp, alternating.
  char moments[2];
  int moment;
  uint64_t gathered[kWarpSize * kMaxGathered];  // the lanes' words of the last gather
};

struct SharedVariable {
  const void* key;
  char* allocation;
  char* address;
  size_t alignment;
};

struct Engine {
  Settings settings;
  Statistics statistics{};
  int launch_error = 0;
  std::string failure;  // of the last launch that failed

  // The launch.
  std::string kernel;
  const std::function<void()>* body = nullptr;
  size_t dynamic_bytes = 0;
  std::mt19937 random;
  std::vector<std::pair<const void*, size_t>> allowed_dynamic_bytes;

  // The block.
  std::vector<Fiber> fiber_sets[kFiberSets];  // blocks take turns with them
  Fiber* fibers = nullptr;
  std::vector<Warp> warps;
  std::vector<int> ready;  // the next to run is the last, or in random order any
  int threads = 0, live = 0, at_barrier = 0, barrier_predicates = 0;
  char moments[2];  // what orders memory across barriers, alternating
  int moment = 0;
  std::vector<SharedVariable> shared;
  size_t static_bytes = 0;

  // Host code runs on a context of its own; `running` is null there.
  Context host_context;
  SanitizedFiber host;
  Fiber* running = nullptr;
  std::string broken;  // why `running` stopped for good
  char launched;       // what every thread waits for
  char end_of_thread;  // what the launch waits for
};

extern Engine engine;

void run_block(uint3 index);
void free_shared_memory();

}  // namespace cuda_simulator
