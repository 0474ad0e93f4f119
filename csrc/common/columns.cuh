// Passes over matrices [rows, C] that may sum over the rows on the way.
//
// A block of 32 x 8 threads takes 32 vectors of 16 bytes of a run of rows; a thread stays in its column, so that what
// belongs to a channel stays in registers: factors, and sums over the rows. Several rows are loaded before the first is
// waited for. The number of runs follows from the sizes alone, so that sums are the same on every device.
#pragma once

#include <algorithm>

#include "common/partial_sums.cuh"
#include "common/rows.cuh"

namespace mra::cuda {

constexpr int kColumns = 32, kColumnRows = 8, kColumnThreads = kColumns * kColumnRows;
constexpr int kColumnBlocks = 4;  // resident on an SM
constexpr int kColumnLoads = 4;   // of a thread, at once

// How the rows of `groups` matrices are cut, one matrix a picture where each has sums of its own.
struct Runs {
  int64_t groups, rows;  // of each group
  int runs;              // of each group

  // Four blocks for each SM of an H200, of at least 8 rows.
  static Runs of(int64_t groups, int64_t rows, int64_t channels) {
    const int64_t tiles = (channels + 255) / 256 * std::max<int64_t>(groups, 1);
    return {groups, rows, static_cast<int>(std::max<int64_t>(1, std::min(528 / tiles, (rows + 7) / 8)))};
  }
  unsigned blocks(int64_t vectors) const {
    return static_cast<unsigned>((vectors + kColumns - 1) / kColumns * groups * runs);
  }
};

// A thread's place: `column` is its first channel, and rows first + 8 i below `last` are its own (none where the
// matrix has no such column).
struct ColumnRun {
  int64_t group, first, last, part;  // part: of all groups' runs
  int column;

  template <int kCount>
  __device__ __forceinline__ static ColumnRun mine(const Runs& runs, int channels) {
    const unsigned tiles = (channels / kCount + kColumns - 1) / kColumns;
    const unsigned part = blockIdx.x / tiles, group = part / runs.runs, run = part % runs.runs;
    const int column = static_cast<int>(blockIdx.x % tiles * kColumns + threadIdx.x) * kCount;
    const int64_t start = group * runs.rows, last = start + runs.rows * (run + 1) / runs.runs;
    return {group, start + runs.rows * run / runs.runs + threadIdx.y, column < channels ? last : start, part, column};
  }
};

// visit(row, offset, v) for each of the rows, in order; offset: of its vector in a matrix [rows, C]; v: that of
// each input, zeros where it is null.
template <int kCount, int kInputs, class T, class Visit>
__device__ __forceinline__ void for_each_row(const ColumnRun& run, int channels, const T* const (&inputs)[kInputs],
                                             Visit visit) {
  constexpr int kRowsAhead = kColumnLoads / kInputs;
  const int64_t step = int64_t{kColumnRows} * channels;
  int64_t offset = run.first * channels + run.column;
  for (int64_t row = run.first; row < run.last; row += kRowsAhead * kColumnRows, offset += kRowsAhead * step) {
    Packed<T, kCount> raw[kRowsAhead][kInputs];
#pragma unroll
    for (int a = 0; a < kRowsAhead; ++a) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        raw[a][i] = {};
        if (row + a * kColumnRows < run.last && inputs[i] != nullptr) raw[a][i].load(inputs[i] + offset + a * step);
      }
    }
#pragma unroll
    for (int a = 0; a < kRowsAhead; ++a) {
      if (row + a * kColumnRows >= run.last) break;
      Floats<kCount> v[kInputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) v[i] = raw[a][i].floats();
      visit(row + a * kColumnRows, offset + a * step, v);
    }
  }
}

// Adds up a block's sums and writes them where its run's are: partial: [groups * runs, kSums, C].
template <int kCount, int kSums>
__device__ __forceinline__ void write_partial(const ColumnSums<kColumnThreads, kCount, 1, kSums>& sums,
                                              const ColumnRun& run, int channels, float* partial) {
  // The block's first channel.
  const int tile = run.column - static_cast<int>(threadIdx.x) * kCount;
  sums.write(partial + run.part * kSums * channels + tile, channels, channels - tile);
}

}  // namespace mra::cuda
