// Rows of C elements held by groups of threads: who reads which 16 bytes, sums over a row, and sums over many rows.
//
// A block is blockDim.x threads for a row (a power of two, up to 128) times blockDim.y rows. Thread x of a row owns its
// vectors x, x + blockDim.x, ...; the first few stay in registers, and what goes beyond is read again.
#pragma once

#include <cstring>

#include "common/elements.cuh"

namespace mra::cuda {

constexpr int kRowThreads = 128;

// How many threads share a row of `vectors` so that each holds `kept` of them.
inline int threads_of_row(int64_t vectors, int kept) {
  int threads = 1;
  while (threads < kRowThreads && int64_t{threads} * kept < vectors) threads *= 2;
  return threads;
}

// What an access moves, in as few registers as it has words: a compiler keeps 16-bit elements in one register each.
template <int kBytes>
struct Words;
template <>
struct Words<2> {
  using Type = unsigned short;
};
template <>
struct Words<4> {
  using Type = unsigned;
};
template <>
struct Words<16> {
  using Type = uint4;
};

template <class T, int kCount>
struct Packed {
  using Type = typename Words<kCount * sizeof(T)>::Type;
  Type words;

  __device__ __forceinline__ void load(const T* p) { words = *reinterpret_cast<const Type*>(p); }
  __device__ __forceinline__ Floats<kCount> floats() const {
    Elements<T, kCount> elements;
    memcpy(&elements, &words, sizeof(Type));
    Floats<kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) out.values[j] = to_float(elements.values[j]);
    return out;
  }
};

// A thread's first vectors of a row, as they are in memory: half the registers of floats.
template <class T, int kCount, int kKept>
struct KeptRow {
  Packed<T, kCount> values[kKept];
  const T* row;

  // All loads are on their way before the first is waited for.
  __device__ __forceinline__ KeptRow(const T* source, int vectors) : row(source) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int i = static_cast<int>(threadIdx.x + k * blockDim.x);
      if (i < vectors) values[k].load(source + static_cast<int64_t>(i) * kCount);
    }
  }

  // Vector i of the row, which is the thread's k-th; k < 0 where it is not kept.
  __device__ __forceinline__ Floats<kCount> at(int i, int k) const {
    return k < 0 ? load<kCount>(row + static_cast<int64_t>(i) * kCount) : values[k].floats();
  }
};

// visit(i, k) for the thread's vectors; k as KeptRow::at has it, a constant after inlining.
template <int kKept, class Visit>
__device__ __forceinline__ void for_each_vector(int vectors, Visit visit) {
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = static_cast<int>(threadIdx.x + k * blockDim.x);
    if (i < vectors) visit(i, k);
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x + kKept * blockDim.x); i < vectors; i += blockDim.x) visit(i, -1);
}

// Sums over the threads of a row, in all of them alike. All threads of the block call it.
template <int kSums>
__device__ __forceinline__ void row_sum(float (&v)[kSums]) {
  const int threads = blockDim.x;
  for (int step = min(threads, 32) / 2; step > 0; step >>= 1) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) v[s] += __shfl_xor_sync(0xffffffffu, v[s], step);
  }
  if (threads <= 32) return;
  __shared__ float warps[kSums][kRowThreads / 32];
  const int count = threads / 32;
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) warps[s][threadIdx.y * count + threadIdx.x / 32] = v[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    v[s] = 0;
    for (int w = 0; w < count; ++w) v[s] += warps[s][threadIdx.y * count + w];
  }
}

// A thread's sums over rows of what its kept vectors' channels contribute, kSums for each channel.
template <int kThreads, int kCount, int kKept, int kSums>
struct ColumnSums {
  float values[kSums][kKept][kCount] = {};

  // Adds the block's rows up in order and writes the first `columns` channels of each sum, `stride` apart. All threads
  // of the block call it.
  __device__ __forceinline__ void write(float* out, int64_t stride, int columns) const {
    __shared__ __align__(16) float buffer[kThreads * kKept * kCount];  // [rows of the block, width]
    const int width = kKept * blockDim.x * kCount;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kKept; ++k) {
        float* mine = buffer + threadIdx.y * width + (threadIdx.x + k * blockDim.x) * kCount;
#pragma unroll
        for (int j = 0; j < kCount; ++j) mine[j] = values[s][k][j];
      }
      __syncthreads();
      for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < min(width, columns); c += kThreads) {
        float total = 0;
        for (int row = 0; row < static_cast<int>(blockDim.y); ++row) total += buffer[row * width + c];
        out[s * stride + c] = total;
      }
    }
  }
};

}  // namespace mra::cuda
