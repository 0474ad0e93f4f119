// patch_conv_norm for the stem of a ConvNeXt in 16 bits, P = 3 and k = 4, on tensor cores: convolution, bias and
// LayerNorm in one pass.
//
// Work: a block of 8 warps keeps the weight in shared memory (18 KB for C = 192) and walks over tiles of patches; a
// warp has 16 patches x 96 channels in registers, and the warps of a patch exchange its sums. A step of K is a plane's
// 4 x 4 pixels in an order of their own: a thread's part of both factors is then a patch's row of 4 pixels, 8 bytes,
// which it loads straight from the picture. The weight's rows are ordered so that a thread ends with 8 neighbouring
// channels, 16 bytes. The next tile's pixels are on their way while this one's norm is computed. 1024 x 1024 pixels at
// batch 1, C = 192: 6 MB in, 25 MB out, 1.2 GFLOP: 7 us by memory.
#pragma once

#include "common/mma.cuh"
#include "cuda/patch_conv_norm.cuh"

namespace mra::cuda {

constexpr int kStemPlanes = 3, kStemPatch = 4, kStemDepth = kStemPlanes * kStemPatch * kStemPatch;
constexpr int kStemWarps = 8, kStemGroups = 3;  // kStemGroups: of 32 channels, a warp's
constexpr int kStemChannels = 384;              // at most, for 4 warps a patch
constexpr int kStemBlocks = 264;                // two for each SM of an H200

// The channel in row r of the weight in shared memory: among 32, column g of the j-th product is g / 2 * 8 + 2 j + g
// % 2.
__device__ __forceinline__ int stem_channel(int r) { return r / 32 * 32 + r % 8 / 2 * 8 + r / 8 % 4 * 2 + r % 2; }

// across: warps that share 16 patches, 1, 2 or 4; each has up to 96 of the channels, a multiple of 32.
template <class T>
__global__ void __launch_bounds__(kStemWarps * 32, 2)
    patch_conv_norm_kernel(PatchGrid<T> grid, const T* __restrict__ weight, const T* __restrict__ bias,
                           const T* __restrict__ norm_weight, const T* __restrict__ norm_bias, T* __restrict__ y,
                           float* __restrict__ mean, float* __restrict__ rstd, int patches, int channels, int across,
                           float eps) {
  extern __shared__ __align__(16) unsigned char memory[];  // weight: [C, 48]
  __shared__ float totals[kStemWarps][16];
  __shared__ float squares[kStemWarps][16];
  T* const weights = reinterpret_cast<T*>(memory);
  constexpr int kChunks = kStemDepth * sizeof(T) / 16;
  for (int i = threadIdx.x; i < channels * kChunks; i += kStemWarps * 32) {
    const T* source = weight + static_cast<int64_t>(stem_channel(i / kChunks)) * kStemDepth;
    reinterpret_cast<uint4*>(memory)[i] = reinterpret_cast<const uint4*>(source)[i % kChunks];
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / 32, part = warp % across, first_group = part * kStemGroups;
  const int tile = kStemWarps / across * 16, row = warp / across * 16 + g;  // row and row + 8 are the thread's
  const int groups = min(kStemGroups, channels / 32 - first_group);
  const float share = 1.0f / channels;

  // A plane's row t of both patches, as mma has a.
  uint32_t pixels[kStemPlanes][4] = {};
  const auto fetch = [&](int64_t start) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t patch = start + row + 8 * half;
      if (patch >= patches) continue;
      const T* source = grid.at(static_cast<unsigned>(patch)) + static_cast<int64_t>(t) * grid.width;
#pragma unroll
      for (int plane = 0; plane < kStemPlanes; ++plane) {
        const int64_t offset = static_cast<int64_t>(plane) * grid.height * grid.width;
        const uint2 four = *reinterpret_cast<const uint2*>(source + offset);
        pixels[plane][half] = four.x;
        pixels[plane][half + 2] = four.y;
      }
    }
  };
  // The sum over a patch's channels of what each thread has of its two patches.
  const auto sum = [&](float (&v)[2], float (&exchange)[kStemWarps][16]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      v[half] += __shfl_xor_sync(0xffffffffu, v[half], 1);
      v[half] += __shfl_xor_sync(0xffffffffu, v[half], 2);
      if (t == 0) exchange[warp][g + 8 * half] = v[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      v[half] = 0;
      for (int other = 0; other < across; ++other) v[half] += exchange[warp - part + other][g + 8 * half];
    }
  };

  fetch(static_cast<int64_t>(blockIdx.x) * tile);
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * tile; start < patches; start += gridDim.x * tile) {
    float conv[kStemGroups][4][4] = {};  // as mma has d; [group][j]: channels 8 t + 2 j and the next of 32
#pragma unroll
    for (int group = 0; group < kStemGroups; ++group) {
      if (group >= groups) break;
#pragma unroll
      for (int plane = 0; plane < kStemPlanes; ++plane) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const T* column = weights + (((first_group + group) * 4 + j) * 8 + g) * kStemDepth + plane * 16 + t * 4;
          mma<T>(conv[group][j], pixels[plane], *reinterpret_cast<const uint2*>(column));
        }
      }
    }
    fetch(start + static_cast<int64_t>(gridDim.x) * tile);

    float total[2] = {}, square[2] = {};
#pragma unroll
    for (int group = 0; group < kStemGroups; ++group) {
      if (group >= groups) break;
      const Floats<8> shift = load<8>(bias + (first_group + group) * 32 + t * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& v = conv[group][i / 2][i % 2 + 2 * half];
          v += shift.values[i];
          total[half] += v;
        }
      }
    }
    sum(total, totals);
    total[0] *= share;
    total[1] *= share;
#pragma unroll
    for (int group = 0; group < kStemGroups; ++group) {
      if (group >= groups) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& v = conv[group][i / 2][i % 2 + 2 * half];
          v -= total[half];
          square[half] = fmaf(v, v, square[half]);
        }
      }
    }
    sum(square, squares);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      square[half] = rsqrtf(square[half] * share + eps);
      const int64_t patch = start + row + 8 * half;
      if (part == 0 && t == 0 && patch < patches) {
        mean[patch] = total[half];
        rstd[patch] = square[half];
      }
    }
#pragma unroll
    for (int group = 0; group < kStemGroups; ++group) {
      if (group >= groups) break;
      const int c = (first_group + group) * 32 + t * 8;
      const Floats<8> scale = load<8>(norm_weight + c), shift = load<8>(norm_bias + c);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Floats<8> out;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float v = conv[group][i / 2][i % 2 + 2 * half];
          out.values[i] = fmaf(v * square[half], scale.values[i], shift.values[i]);
        }
        const int64_t patch = start + row + 8 * half;
        if (patch < patches) store<8>(y + patch * channels + c, out);
      }
    }
  }
}

}  // namespace mra::cuda
