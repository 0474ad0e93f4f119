// Runs one block: its threads as fibers, which stop where they must wait for one another.
#include <algorithm>

#include "engine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_simulator {

Engine engine;

namespace {

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string text(const Place& place) {
  return std::string(place.operation) + " at " + place.file + ":" + std::to_string(place.line);
}

void stop(Fiber& self) {
  before_switch(self.sanitized, engine.host, self.state == State::kReturned);
  Context::swap(self.context, engine.host_context);
  after_switch(self.sanitized, nullptr);
}

void run(Fiber& fiber) {
  engine.running = &fiber;
  threadIdx = fiber.thread;
  before_switch(engine.host, fiber.sanitized, false);
  Context::swap(engine.host_context, fiber.context);
  after_switch(engine.host, nullptr);
  engine.running = nullptr;
  if (!engine.broken.empty()) throw Error(engine.broken);
}

// Where every fiber begins. It never returns: there is nothing below it on its stack.
void first_frame() {
  Fiber& self = *engine.running;
  after_switch(self.sanitized, &engine.host);
  acquire(&engine.launched);
  (*engine.body)();
  self.state = State::kReturned;
  release(&engine.end_of_thread);
  stop(self);
  __builtin_unreachable();
}

void make_ready(int first, int count, uint32_t lanes = ~0u) {
  for (int i = 0; i < count; ++i) {
    // The last one runs first.
    const int k = engine.settings.order == Order::kReverse ? i : count - 1 - i;
    if (count <= kWarpSize && !(lanes >> k & 1)) continue;
    engine.fibers[first + k].state = State::kReady;
    engine.ready.push_back(first + k);
  }
}

Fiber& next_ready() {
  if (engine.settings.order == Order::kRandom) {
    std::swap(engine.ready[engine.random() % engine.ready.size()], engine.ready.back());
  }
  Fiber& next = engine.fibers[engine.ready.back()];
  engine.ready.pop_back();
  return next;
}

// Who waits where: the first of the threads at each place.
std::string waiting_threads() {
  std::string list;
  std::vector<Place> seen;
  for (int i = 0; i < engine.threads; ++i) {
    const Fiber& fiber = engine.fibers[i];
    if (fiber.state != State::kAtBarrier && fiber.state != State::kInWarp) continue;
    const auto same = [&](const Place& p) {
      return p.line == fiber.place.line && p.operation == fiber.place.operation;
    };
    if (std::any_of(seen.begin(), seen.end(), same)) continue;
    seen.push_back(fiber.place);
    list += (list.empty() ? "" : ", ") + ("thread " + text(fiber.thread)) + " in " + text(fiber.place);
  }
  return list;
}

bool same_place(const Place& a, const Place& b) { return a.line == b.line && std::string(a.file) == b.file; }

void pass_barrier() {
  if (engine.live != engine.threads) {
    fail(std::to_string(engine.threads - engine.live) +
         " threads have returned before the others' barrier: " + waiting_threads());
  }
  engine.barrier_predicates = 0;
  for (int i = 0; i < engine.threads; ++i) {
    const Fiber& fiber = engine.fibers[i];
    if (!same_place(fiber.place, engine.fibers[0].place)) {
      fail("threads of one block meet in different barriers: " + waiting_threads());
    }
    engine.barrier_predicates += fiber.predicate;
  }
  engine.at_barrier = 0;
  engine.moment ^= 1;
  ++engine.statistics.barriers;
  make_ready(0, engine.threads);
}

void finish_collective(Warp& warp, const Fiber& caller) {
  Fiber* lanes = &engine.fibers[warp.first];
  uint32_t ballot = 0;
  for (int i = 0; i < warp.lanes; ++i) {
    if (!(caller.mask >> i & 1)) continue;
    if (lanes[i].mask != caller.mask || lanes[i].kind != caller.kind || !same_place(lanes[i].place, caller.place)) {
      fail("lanes of one mask meet in different operations: " + waiting_threads());
    }
    ballot |= static_cast<uint32_t>(lanes[i].value != 0) << i;
  }
  for (int i = 0; i < warp.lanes; ++i) {
    if (!(caller.mask >> i & 1)) continue;
    if (caller.kind == Collective::kBallot) lanes[i].result = ballot;
    // What a lane outside the mask would give is undefined: NaN.
    if (caller.kind == Collective::kShuffle) {
      lanes[i].result = caller.mask >> lanes[i].source & 1 ? lanes[lanes[i].source].value : ~uint64_t{0};
    }
  }
  if (caller.kind == Collective::kGather) {
    const int count = static_cast<int>(caller.value);
    for (int i = 0; i < warp.lanes; ++i) {
      for (int j = 0; j < count; ++j) warp.gathered[i * count + j] = lanes[i].words[j];
    }
  }
  warp.arrived &= ~caller.mask;
  warp.moment ^= 1;
  ++engine.statistics.collectives;
  make_ready(warp.first, warp.lanes, caller.mask);
}

void begin_block() {
  engine.fibers = engine.fiber_sets[engine.statistics.blocks % kFiberSets].data();
  engine.threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  engine.live = engine.threads;
  engine.at_barrier = 0;
  engine.ready.clear();
  engine.warps.clear();
  for (int first = 0; first < engine.threads; first += kWarpSize) {
    engine.warps.push_back({first, std::min(kWarpSize, engine.threads - first), 0, {}, 0, {}});
  }
  for (int i = 0; i < engine.threads; ++i) {
    Fiber& fiber = engine.fibers[i];
    const auto n = static_cast<unsigned>(i);
    fiber.thread = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    fiber.warp = i / kWarpSize;
    fiber.lane = i % kWarpSize;
    fiber.copies.clear();
    fiber.sanitized.begin(fiber.stack, kStackBytes);
    fiber.context.prepare(fiber.stack, kStackBytes, first_frame);
  }
  make_ready(0, engine.threads);
}

}  // namespace

void run_block(uint3 index) {
  blockIdx = index;
  begin_block();
  while (engine.live > 0) {
    if (engine.ready.empty()) fail("deadlock: " + waiting_threads());
    Fiber& fiber = next_ready();
    run(fiber);
    Warp& warp = engine.warps[fiber.warp];
    if (fiber.state == State::kReturned) --engine.live;
    if (fiber.state == State::kAtBarrier) ++engine.at_barrier;
    if (fiber.state == State::kInWarp) {
      warp.arrived |= 1u << fiber.lane;
      if ((warp.arrived & fiber.mask) == fiber.mask) finish_collective(warp, fiber);
    }
    if (engine.live > 0 && engine.at_barrier == engine.live) pass_barrier();
  }
  ++engine.statistics.blocks;
}

void fail(const std::string& what) {
  std::string message = what + "; kernel " + engine.kernel + ", block " + text(blockIdx);
  if (engine.running == nullptr) throw Error(message);
  // From a fiber there is no way down the stack: the host throws, and the fiber is left where it stands.
  Fiber& self = *engine.running;
  engine.broken = message + ", thread " + text(self.thread);
  self.state = State::kReturned;
  stop(self);
  __builtin_unreachable();
}

int block_barrier(bool predicate, Place place) {
  Fiber& self = *engine.running;
  self.state = State::kAtBarrier;
  self.place = place;
  self.predicate = predicate;
  void* moment = &engine.moments[engine.moment];
  release(moment);
  stop(self);
  acquire(moment);
  return engine.barrier_predicates;
}

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, Place place) {
  Fiber& self = *engine.running;
  Warp& warp = engine.warps[self.warp];
  if (!(mask >> self.lane & 1)) fail(text(place) + ": the calling lane is not in its mask");
  const uint32_t all = warp.lanes == kWarpSize ? ~0u : (1u << warp.lanes) - 1;
  if (mask & ~all) fail(text(place) + ": the mask names lanes that the warp does not have");
  for (int i = 0; i < warp.lanes; ++i) {
    if ((mask >> i & 1) && engine.fibers[warp.first + i].state == State::kReturned) {
      fail(text(place) + ": the mask names a lane that has returned");
    }
  }
  self.state = State::kInWarp;
  self.place = place;
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.source = source;
  // Shuffles and votes exchange registers; of memory they promise nothing.
  void* moment = &warp.moments[warp.moment];
  if (kind == Collective::kSync) release(moment);
  stop(self);
  if (kind == Collective::kSync) acquire(moment);
  return self.result;
}

const uint64_t* warp_gather(const uint64_t* words, int count, Place place) {
  if (count > kMaxGathered) fail("a gather of more words than the engine has room for");
  engine.running->words = words;
  warp_collective(Collective::kGather, ~0u, static_cast<uint64_t>(count), 0, place);
  return engine.warps[engine.running->warp].gathered;
}

int lane() { return engine.running->lane; }

}  // namespace cuda_simulator
