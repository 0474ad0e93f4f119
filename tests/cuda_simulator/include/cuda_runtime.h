// Stands in for the CUDA toolkit's header: the language and the part of the runtime that kernels and their launchers
// use, on a simulated GPU. What is missing fails to compile.
#pragma once

#include "cuda_simulator/engine.h"
#include "cuda_simulator/host.h"
#include "cuda_simulator/intrinsics.h"
#include "cuda_simulator/math.h"
#include "cuda_simulator/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
