// bfloat16.
#pragma once

#include "cuda_simulator/float16.h"

using __nv_bfloat16 = cuda_simulator::Float16<cuda_simulator::BFloat16Bits>;
using __nv_bfloat162 = cuda_simulator::Pair<__nv_bfloat16>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
CUDA_SIMULATOR_FLOAT16(__nv_bfloat16, __nv_bfloat162, bfloat16)
