#include "cuda/layer_norm_launch.h"

namespace mra::cuda {

int64_t layer_norm_partials(int64_t rows, int64_t channels) { return layer_norm_blocks(rows) * kNormSums * channels; }

void layer_norm_rows(const LayerNormRows& a) { launch_layer_norm(a, SameOrder{}); }

void layer_norm_rows_backward(const LayerNormRowsBackward& a) { launch_layer_norm_backward(a, SameOrder{}); }

}  // namespace mra::cuda
