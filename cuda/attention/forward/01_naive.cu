// Step 01: the definition, in three kernels: scores, softmax along rows, and their product with V. All B x H x T x S
// scores lie in global memory between them.
//
// A thread has one score, or one element of o; neighbours walk along the keys, or along the columns of o. A warp has a
// row of the softmax. Limit: loads, two for each FMA, and neighbours in the first kernel read different rows of K. The
// scores pass through memory six times, 4 bytes each, and their room grows with the square of the length.
// Refuses: head widths that are no multiple of 8, or above 256.
#include "attention/softmax.cuh"

namespace attention::forward {
namespace {

constexpr int threads = 256;

// Elements of a (batch, heads, queries, columns) array, counted through. `s` is the sequence; with sequences of
// different length the array has room for the longest, and rows past the end of the others stay as they are.
struct Element {
  int b, head, query, column;
  Sequence s;

  __device__ __forceinline__ Element(const Sizes& sizes, int columns, int64_t index)
      : b(int(index / columns / sizes.queries / sizes.heads)),
        head(int(index / columns / sizes.queries % sizes.heads)),
        query(int(index / columns % sizes.queries)),
        column(int(index % columns)),
        s(sizes.sequence(b)) {}
};

template <class T>
__global__ void __launch_bounds__(threads)
    naive_scores(Rows<T> q, Rows<T> k, float* scores, int64_t count, Sizes sizes, Rules rules, int head_dim) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= count) return;
  const Element at(sizes, sizes.keys, index);
  const int key = at.column;
  if (at.query >= at.s.queries || key >= at.s.keys) return;
  const T* const q_row = q.at(at.b, at.s.first_query + at.query, at.head);
  const T* const k_row = k.at(at.b, at.s.first_key + key, sizes.kv_head(at.head));
  float product = 0.f;
  for (int d = 0; d < head_dim; ++d) product += float(q_row[d]) * float(k_row[d]);
  scores[index] = rules.scale * rules.score(at.s, at.b, at.head, at.query, key, product);
}

// A warp's row of scores becomes probabilities, in place.
__global__ void __launch_bounds__(threads)
    naive_softmax(float* scores, float* lse, int64_t lse_batch, int64_t lse_head, int64_t rows, Sizes sizes,
                  Rules rules) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const Element at(sizes, 1, row);
  if (at.query >= at.s.queries) return;
  float* const x = scores + row * sizes.keys;

  const float sink = rules.sink ? rules.sink[at.head] : -INFINITY;
  float most = sink;
  for (int key = lane; key < at.s.keys; key += 32) most = max(most, x[key]);
  for (int apart = 16; apart > 0; apart /= 2) most = max(most, __shfl_xor_sync(0xffffffff, most, apart));
  const float shift = most == -INFINITY ? 0.f : most;  // the row sees nothing: all exponentials are 0

  float sum = 0.f;
  for (int key = lane; key < at.s.keys; key += 32) sum += x[key] = expf(x[key] - shift);
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffff, sum, apart);
  sum += expf(sink - shift);

  const float factor = sum == 0.f ? 0.f : 1.f / sum;
  for (int key = lane; key < at.s.keys; key += 32) x[key] *= factor;
  if (lane == 0) lse[at.b * lse_batch + at.head * lse_head + at.s.first_query + at.query] = shift + logf(sum);
}

template <class T>
__global__ void __launch_bounds__(threads)
    naive_values(const float* probabilities, Rows<T> v, Rows<T> o, int64_t count, Sizes sizes, int head_dim) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= count) return;
  const Element at(sizes, head_dim, index);
  if (at.query >= at.s.queries) return;
  const float* const p = probabilities + index / head_dim * sizes.keys;
  float sum = 0.f;
  for (int key = 0; key < at.s.keys; ++key)
    sum += p[key] * float(v.at(at.b, at.s.first_key + key, sizes.kv_head(at.head))[at.column]);
  o.at(at.b, at.s.first_query + at.query, at.head)[at.column] = T(sum);
}

simt::Launch grid_of(const Problem& p, int64_t count, int per_block) {
  simt::Launch launch{dim3(unsigned((count + per_block - 1) / per_block)), dim3(threads)};
  launch.stream = p.stream;
  return launch;
}

}  // namespace

void naive_01(const Problem& p, float* scores) {
  if (p.head_dim % 8 || p.head_dim > 256)
    refuse("naive_01: head width " + std::to_string(p.head_dim) + " of q: expected a multiple of 8 up to 256");
  const Sizes sizes = Sizes::of(p);
  const Rules rules = Rules::of(p);
  const int64_t rows = int64_t(p.batch) * p.heads * p.queries, count = rows * p.keys, results = rows * p.head_dim;
  for_type(p, [&](auto element) {
    using T = decltype(element);
    const auto q = Rows<T>::of(p.q), k = Rows<T>::of(p.k), v = Rows<T>::of(p.v), o = Rows<T>::of(p.o);
    simt::launch(naive_scores<T>, grid_of(p, count, threads), q, k, scores, count, sizes, rules, p.head_dim);
    simt::launch(naive_softmax, grid_of(p, rows, threads / 32), scores, p.lse, p.lse_batch, p.lse_head, rows, sizes,
                 rules);
    simt::launch(naive_values<T>, grid_of(p, results, threads), scores, v, o, results, sizes, p.head_dim);
  });
}

}  // namespace attention::forward
