// Backward of attention: the scores are computed again, so that nothing of their size is kept.
//
// With p = exp(scale * query key^T - logsumexp) and d = sum over channels of grad_y * y:
// grad_value = p^T grad_y, grad_score = p * (grad_y value^T - d), grad_query = scale * grad_score key and
// grad_key = scale * grad_score^T query (Dao et al. 2022, algorithm 4).
//
// Work: a head of a picture to a task, which alone sums its gradients, in the order of queries. Blocks of queries
// against blocks of keys, as in forward. Where pairs of bfloat16 are multiplied, p and grad_score are rounded to it
// first, as PyTorch's are. Work per score: 10 * D FLOPs and one exponential; bound by arithmetic.
#include <initializer_list>

#include "cpu/attention.h"

namespace mra::cpu::MRA_ISA {
namespace {

template <class T>
struct Backward {
  static constexpr int kCount = Units<T>::kCount;
  static constexpr int64_t kScores = int64_t{kBlockQueries} * kBlockKeys;

  const AttentionBackward& a;
  const int64_t units = row_units<T>(a.channels), width = padded(a.channels);
  const int64_t keys = round_up(a.keys, kSumLanes);
  // Panels of columns.
  float* const key = thread_buffer<Backward>(keys * (2 * units + width / kCount + 2 * width) +
                                             kBlockQueries * (2 * units + 2 * width / kCount + width) + 4 * kScores);
  float* const value = key + keys * units;                                   // panels, as key
  float* const key_depths = value + keys * units;                            // [keys / kCount, width]
  float* const grad_key = key_depths + keys / kCount * width;                // [keys, width]
  float* const grad_value = grad_key + keys * width;                         // [keys, width]
  float* const query = grad_value + keys * width;                            // [kBlockQueries, units]
  float* const grad_y = query + kBlockQueries * units;                       // [kBlockQueries, units]
  float* const query_depths = grad_y + kBlockQueries * units;                // [kBlockQueries / kCount, width]
  float* const grad_depths = query_depths + kBlockQueries / kCount * width;  // [kBlockQueries / kCount, width]
  float* const grad_query = grad_depths + kBlockQueries / kCount * width;    // [kBlockQueries, width]
  float* const scores = grad_query + kBlockQueries * width;                  // [kBlockQueries, kBlockKeys]
  float* const grad_shares = scores + kScores;                               // [kBlockQueries, kBlockKeys]
  float* const share_depths = grad_shares + kScores;                         // [kBlockQueries / kCount, kBlockKeys]
  float* const score_depths = share_depths + kScores;                        // [kBlockQueries / kCount, kBlockKeys]

  void run(int64_t b, int64_t h) const {
    const auto key_rows = head_rows<T>(a.key, b, h, a.keys, a.key_stride, a.channels);
    pack_columns(key_rows, query, key);
    pack_columns(head_rows<T>(a.value, b, h, a.keys, a.value_stride, a.channels), query, value);
    pack_depths(key_rows, key_depths);
    std::memset(grad_key, 0, 2 * keys * width * sizeof(float));
    for (int64_t first = 0; first < a.queries; first += kBlockQueries) add_block(b, h, first);
    write(grad_key, a.keys, b, h, 0, a.keys, a.grad_key);
    write(grad_value, a.keys, b, h, 0, a.keys, a.grad_value);
  }

 private:
  // What queries from number `first` on add to all gradients.
  void add_block(int64_t b, int64_t h, int64_t first) const {
    const int64_t packed = a.heads * a.channels;
    const auto queries = head_rows<T>(a.query, b, h, a.queries, a.query_stride, a.channels).from(first, kBlockQueries);
    const auto grads = head_rows<T>(a.grad_y, b, h, a.queries, packed, a.channels).from(first, kBlockQueries);
    const auto outputs = head_rows<T>(a.y, b, h, a.queries, packed, a.channels).from(first, kBlockQueries);
    const int64_t rows = queries.count;
    pack_rows(queries, query);
    pack_rows(grads, grad_y);
    // The last of an odd number of queries is paired with one that is none.
    for (float* row : {query + rows * units, grad_y + rows * units}) {
      if (rows % 2 != 0) std::memset(row, 0, units * sizeof(float));
    }
    pack_depths(queries, query_depths);
    pack_depths(grads, grad_depths);
    float logsumexp[kBlockQueries], products[kBlockQueries];
    for (int64_t i = 0; i < kBlockQueries; ++i) {
      logsumexp[i] = i < rows ? a.logsumexp[(b * a.heads + h) * a.queries + first + i] : INFINITY;
      products[i] = i < rows ? dot(grads.row(i), outputs.row(i)) : 0;
    }
    std::memset(grad_query, 0, kBlockQueries * width * sizeof(float));
    for (int64_t begin = 0; begin < a.keys; begin += kBlockKeys) {
      const int64_t count = smaller(kBlockKeys, a.keys - begin);
      score<T>(query, rows, key, begin, count, units, a.scale, scores);
      score<T>(grad_y, rows, value, begin, count, units, 1, grad_shares);
      for (int64_t i = 0; i < rows; i += 2) differentiate(i, count, logsumexp + i, products + i);
      const int64_t depths = (rows + kCount - 1) / kCount;
      add(scores, kBlockKeys, 1, key_depths + begin / kCount * width, (count + kCount - 1) / kCount, rows, grad_query);
      add(share_depths, 1, kBlockKeys, grad_depths, depths, count, grad_value + begin * width);
      add(score_depths, 1, kBlockKeys, query_depths, depths, count, grad_key + begin * width);
    }
    write(grad_query, rows, b, h, first, a.queries, a.grad_query);
  }

  float dot(const T* x, const T* y) const {
    Floats products = {};
    for_each_vector(a.channels,
                    [&](int64_t c, int64_t lanes) { products += load_first(x + c, lanes) * load_first(y + c, lanes); });
    return sum(products);
  }

  // Scores of two queries to units of the scores' gradients, by queries and by keys, and of shares, by keys.
  void differentiate(int64_t i, int64_t count, const float* logsumexp, const float* products) const {
    float* const row = scores + i * kBlockKeys;
    const float* const grads = grad_shares + i * kBlockKeys;
    const int64_t unit = i / kCount * kBlockKeys;
    mask(row, count);
    mask(row + kBlockKeys, count);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Floats first = exp_negative(load(row + j) - logsumexp[0]);
      const Floats second = exp_negative(load(row + kBlockKeys + j) - logsumexp[1]);
      const Floats grad_first = a.scale * first * (load(grads + j) - products[0]);
      const Floats grad_second = a.scale * second * (load(grads + kBlockKeys + j) - products[1]);
      Units<T>::store_row(row, j, grad_first);
      Units<T>::store_row(row + kBlockKeys, j, grad_second);
      Units<T>::store_rows(share_depths + unit + j, kBlockKeys, first, second);
      Units<T>::store_rows(score_depths + unit + j, kBlockKeys, grad_first, grad_second);
    }
  }

  // sums += left right.
  void add(const float* left, int64_t row_stride, int64_t depth_stride, const float* right, int64_t depths,
           int64_t rows, float* sums) const {
    add_product<T>(left, row_stride, depth_stride, right, depths, rows, width, sums, [](int64_t) { return 1.0f; });
  }

  // sums: [rows, width] -> grad: [B, count, H, D], from row `first` on.
  void write(const float* sums, int64_t rows, int64_t b, int64_t h, int64_t first, int64_t count, void* grad) const {
    for (int64_t i = 0; i < rows; ++i) {
      T* row = static_cast<T*>(grad) + ((b * count + first + i) * a.heads + h) * a.channels;
      for_each_vector(a.channels,
                      [&](int64_t c, int64_t lanes) { store_first(row + c, load(sums + i * width + c), lanes); });
    }
  }
};

template <class T>
void backward(const AttentionBackward& a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.place.threads)
  for (int64_t head = 0; head < a.batch * a.heads; ++head) {
    Backward<T>{a}.run(head / a.heads, head % a.heads);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
