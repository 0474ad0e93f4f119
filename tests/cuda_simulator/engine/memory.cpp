// Shared memory and asynchronous copies of the block that runs.
#include <cstdlib>
#include <cstring>

#include "engine.h"

namespace cuda_simulator {

namespace {

// NaN in float, bfloat16 and half: a value that nobody wrote shows in the result.
void fill_with_nan(char* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) p[i] = '\xff';
}

// Memory that ends where its allocation does, and is aligned as asked but no better: an access that needs more shows.
SharedVariable allocate(const void* key, size_t bytes, size_t alignment) {
  const Unwatched unwatched;
  void* allocation = nullptr;
  if (posix_memalign(&allocation, 2 * alignment < 16 ? 16 : 2 * alignment, alignment + bytes) != 0) {
    fail("out of memory for shared memory");
  }
  char* address = static_cast<char*>(allocation) + alignment;
#if defined(CUDA_SIMULATOR_ASAN)
  __asan_poison_memory_region(allocation, alignment);
#endif
  fill_with_nan(address, bytes);
  engine.shared.push_back({key, static_cast<char*>(allocation), address, alignment});
  return engine.shared.back();
}

const SharedVariable* find(const void* key) {
  for (const SharedVariable& variable : engine.shared) {
    if (variable.key == key) return &variable;
  }
  return nullptr;
}

void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    // Through the thread's own stack: the library call is this thread's access to the target, and to nothing else.
    char data[16];
    for (size_t i = 0; i < copy.bytes; ++i) data[i] = copy.data[i];
    memcpy(copy.target, data, copy.bytes);
  }
}

}  // namespace

void* shared_variable(const void* key, size_t bytes, size_t alignment) {
  if (const SharedVariable* known = find(key)) return known->address;
  engine.static_bytes += bytes;
  if (engine.static_bytes > kStaticSharedBytes) {
    fail("static shared memory of " + std::to_string(engine.static_bytes) + " bytes exceeds " +
         std::to_string(kStaticSharedBytes) + "; make it dynamic");
  }
  if (engine.static_bytes + engine.dynamic_bytes > kMaxSharedBytes) {
    fail("static and dynamic shared memory of " + std::to_string(engine.static_bytes + engine.dynamic_bytes) +
         " bytes exceeds " + std::to_string(kMaxSharedBytes));
  }
  return allocate(key, bytes, alignment).address;
}

void* dynamic_shared_memory(size_t alignment) {
  // All declarations name the same memory, whatever its element type.
  const void* key = &engine.dynamic_bytes;
  const SharedVariable* known = find(key);
  if (known == nullptr) return allocate(key, engine.dynamic_bytes, alignment).address;
  if (known->alignment < alignment) {
    fail("dynamic shared memory is declared with alignment " + std::to_string(known->alignment) + " and " +
         std::to_string(alignment) + "; declare it with __align__ alike everywhere");
  }
  return known->address;
}

void free_shared_memory() {
  const Unwatched unwatched;
  for (const SharedVariable& variable : engine.shared) free(variable.allocation);
  engine.shared.clear();
  engine.static_bytes = 0;
}

void async_copy(void* target, const void* source, size_t bytes, size_t zero_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy moves 4, 8 or 16 bytes");
  if (zero_bytes > bytes) fail("an asynchronous copy has more zeros than bytes");
  if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) % bytes != 0) {
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes has a misaligned address");
  }
  ++engine.statistics.copies;
  char data[16] = {};
  memcpy(data, source, bytes - zero_bytes);
  const Order order = engine.settings.order;
  if (order == Order::kReverse || (order == Order::kRandom && engine.random() % 2 == 0)) {
    memcpy(target, data, bytes);
    return;
  }
  const Unwatched unwatched;
  auto& copies = engine.running->copies;
  if (copies.empty()) copies.emplace_back();
  Copy copy{static_cast<char*>(target), bytes, {}};
  for (size_t i = 0; i < bytes; ++i) copy.data[i] = data[i];
  copies.back().push_back(copy);
}

void async_commit() {
  const Unwatched unwatched;
  auto& copies = engine.running->copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}

void async_wait(size_t groups) {
  auto& copies = engine.running->copies;
  while (copies.size() > groups + 1) {
    land(copies.front());
    const Unwatched unwatched;
    copies.erase(copies.begin());
  }
}

void count_atomic() { ++engine.statistics.atomics; }

}  // namespace cuda_simulator
