// Attention over all keys: softmax(scale * query key^T) value of each head.
//
// Work: a head of a picture to a task, or some of its queries where heads are few for the threads. A task packs the
// head's keys and values as `multiply` reads them. Then for each block of queries it goes over blocks of keys: their
// scores, the exponentials beside the largest so far, and their share of the sum, which is scaled down where a larger
// score comes (online softmax, Milakov & Gimelshein 2018; in blocks, Dao et al. 2022). Scores, sums and statistics are
// float32; where pairs of bfloat16 are multiplied, exponentials are rounded to it first, as PyTorch's are.
// Work per score: 4 * D FLOPs and one exponential; bound by arithmetic.
#include "cpu/attention.h"

namespace mra::cpu::MRA_ISA {
namespace {

// Tasks for each thread, so that all end together.
constexpr int64_t kTasks = 4;

template <class T>
struct Forward {
  const AttentionForward& a;
  const int64_t units = row_units<T>(a.channels), width = padded(a.channels);
  const int64_t keys = round_up(a.keys, kSumLanes);
  // Panels of columns.
  float* const key = thread_buffer<Forward>(keys * units + keys / Units<T>::kCount * width +
                                            kBlockQueries * (units + kBlockKeys + width));
  float* const value = key + keys * units;                       // [keys / Units::kCount, width]
  float* const query = value + keys / Units<T>::kCount * width;  // [kBlockQueries, units]
  float* const scores = query + kBlockQueries * units;           // [kBlockQueries, kBlockKeys]
  float* const sums = scores + kBlockQueries * kBlockKeys;       // [kBlockQueries, width]

  void pack(int64_t b, int64_t h) const {
    pack_columns(head_rows<T>(a.key, b, h, a.keys, a.key_stride, a.channels), query, key);
    pack_depths(head_rows<T>(a.value, b, h, a.keys, a.value_stride, a.channels), value);
  }

  // Queries from number `first` on.
  void attend(int64_t b, int64_t h, int64_t first) const {
    const auto rows = head_rows<T>(a.query, b, h, a.queries, a.query_stride, a.channels).from(first, kBlockQueries);
    pack_rows(rows, query);
    float maximum[kBlockQueries], total[kBlockQueries] = {}, fade[kBlockQueries] = {};
    for (float& most : maximum) most = -INFINITY;
    std::memset(sums, 0, kBlockQueries * width * sizeof(float));
    for (int64_t begin = 0; begin < a.keys; begin += kBlockKeys) {
      const int64_t count = smaller(kBlockKeys, a.keys - begin);
      score<T>(query, rows.count, key, begin, count, units, a.scale, scores);
      for (int64_t i = 0; i < rows.count; ++i) {
        float* row = scores + i * kBlockKeys;
        mask(row, count);
        fade[i] = exponentials(row, count, &maximum[i], &total[i]);
      }
      constexpr int kCount = Units<T>::kCount;
      add_product<T>(scores, kBlockKeys, 1, value + begin / kCount * width, (count + kCount - 1) / kCount, rows.count,
                     width, sums, [&](int64_t row) { return fade[row]; });
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t l = first + i;
      T* y = static_cast<T*>(a.y) + ((b * a.queries + l) * a.heads + h) * a.channels;
      const float share = 1 / total[i];
      for_each_vector(a.channels,
                      [&](int64_t c, int64_t lanes) { store_first(y + c, load(sums + i * width + c) * share, lanes); });
      a.logsumexp[(b * a.heads + h) * a.queries + l] = maximum[i] + logf(total[i]);
    }
  }

 private:
  // A row of scores to units of exp(score - maximum), `maximum` being the largest so far, and `total` their sum so far.
  // Returns the factor of what was summed before.
  static float exponentials(float* row, int64_t count, float* maximum, float* total) {
    Floats most = broadcast(*maximum);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Floats scores = load(row + j);
      most = most > scores ? most : scores;
    }
    float next = most[0];
    for (int lane = 1; lane < kLanes; ++lane) next = next > most[lane] ? next : most[lane];
    // Infinity less infinity is a NaN.
    const float origin = next == -INFINITY ? 0.0f : next;
    const float fade = exp_negative(broadcast(*maximum - origin))[0];
    Floats sums = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      const Floats exponential = exp_negative(load(row + j) - origin);
      sums += exponential;
      Units<T>::store_row(row, j, exponential);
    }
    *maximum = next;
    *total = *total * fade + sum(sums);
    return fade;
  }
};

template <class T>
void forward(const AttentionForward& a) {
  const int64_t heads = a.batch * a.heads, blocks = (a.queries + kBlockQueries - 1) / kBlockQueries;
  const int64_t parts = smaller(blocks, larger(1, kTasks * a.place.threads / larger(1, heads)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.place.threads)
  for (int64_t task = 0; task < heads * parts; ++task) {
    const int64_t head = task / parts, part = task % parts;
    const int64_t b = head / a.heads, h = head % a.heads;
    const Forward<T> of{a};
    of.pack(b, h);
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      of.attend(b, h, block * kBlockQueries);
    }
  }
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
