// Who sees whom, inside kernels: a sequence of the batch, the range of keys that a tile of queries needs (and the other way
// round), and what is done to scores between the two products. One place for all steps.
#pragma once
#include <stdexcept>
#include <string>

#include "attention/attention.h"
#include "simt/ptx.cuh"

namespace attention {

__host__ __device__ constexpr int divide_up(int x, int y) { return (x + y - 1) / y; }

// A tensor as kernels see it.
template <class T>
struct Rows {
  T* data;
  int64_t batch, row, head;
  static Rows of(const Tensor& x) { return {static_cast<T*>(x.data), x.batch, x.row, x.head}; }
  __device__ __forceinline__ T* at(int b, int i, int h) const { return data + b * batch + i * row + h * head; }
};

// From first to last - 1; empty where last <= first.
struct Range {
  int first, last;
};

// One sequence of the batch. `first_query` and `first_key` are where it starts among the packed rows, 0 where all are as
// long; tensors then have a batch stride.
struct Sequence {
  int queries, keys, first_query, first_key;
  __device__ __forceinline__ int offset() const { return keys - queries; }  // query i stands at key i + offset
};

// What a kernel is told beside its tensors.
struct Sizes {
  int batch, heads, kv_heads, queries, keys;
  const int32_t *starts_q, *starts_k;
  static Sizes of(const Problem& p) { return {p.batch, p.heads, p.kv_heads, p.queries, p.keys, p.starts_q, p.starts_k}; }

  __device__ __forceinline__ Sequence sequence(int b) const {
    if (!starts_q) return {queries, keys, 0, 0};
    const int q = starts_q[b], k = starts_k[b];
    return {starts_q[b + 1] - q, starts_k[b + 1] - k, q, k};
  }
  __device__ __forceinline__ int kv_head(int head) const { return head / (heads / kv_heads); }
};

struct Rules {
  float scale, softcap;
  int left, right;
  const float *sink, *bias;
  int64_t bias_batch, bias_head, bias_row;
  float unscale, cap, uncap;  // 1 / scale; softcap in units of scale, and 1 / cap: kernels should not divide
  static Rules of(const Problem& p) {
    const float uncap = p.softcap != 0.f ? p.scale / p.softcap : 0.f;
    return {p.scale, p.softcap, p.left, p.right, p.sink, p.bias, p.bias_batch, p.bias_head, p.bias_row,
            1.f / p.scale, p.softcap / p.scale, uncap};
  }

  __device__ __forceinline__ bool sees(const Sequence& s, int query, int key) const {
    const int distance = key - query - s.offset();
    return key < s.keys && distance >= -left && distance <= right;
  }
  // The keys that any of the queries [first, last) sees, and the queries that see any of the keys [first, last).
  __device__ __forceinline__ Range keys_of(const Sequence& s, int first, int last) const {
    return {max(0, first + s.offset() - left), min(s.keys, min(last, s.queries) + s.offset() + right)};
  }
  __device__ __forceinline__ Range queries_of(const Sequence& s, int first, int last) const {
    return {max(0, first - s.offset() - right), min(s.queries, min(last, s.keys) - s.offset() + left)};
  }
  // Whether each of the queries [query, query + queries) sees each of the keys [key, key + keys), and scores stay as the
  // product gave them: `edit` has nothing to do.
  __device__ __forceinline__ bool plain(const Sequence& s, int query, int queries, int key, int keys) const {
    const int nearest = key + keys - 1 - query - s.offset(), farthest = key - (query + queries - 1) - s.offset();
    return softcap == 0.f && !bias && key + keys <= s.keys && nearest <= right && farthest >= -left;
  }

  // What the softmax is taken of, divided by `scale`, which goes into the exponential instead: cap and bias are in units
  // of it, and what is not seen is -inf. `product` = q . k.
  __device__ __forceinline__ float score(const Sequence& s, int b, int head, int query, int key, float product) const {
    if (!sees(s, query, key)) return -INFINITY;
    float x = product;
    if (softcap != 0.f) x = cap * ptx::tanh_approx(product * uncap);
    if (bias && query < s.queries) x += bias[b * bias_batch + head * bias_head + query * bias_row + key] * unscale;
    return x;
  }
  // d score / d product, of a product.
  __device__ __forceinline__ float slope(float product) const {
    if (softcap == 0.f) return 1.f;
    const float t = ptx::tanh_approx(product * uncap);
    return 1.f - t * t;
  }
};

// `score` of a fragment of n columns as mma.sync and wgmma leave them to a lane: x[i] belongs to row `query` +
// 8 (i / 2 % 2), column `key` + 8 (i / 4) + i % 2, where `query` and `key` are those of the lane's x[0]. One rule after
// the other: asking for all at each element makes the code three times as long, and its addresses take the registers.
template <int n>
__device__ __forceinline__ void edit(float (&x)[n / 2], const Rules& rules, const Sequence& s, int b, int head, int query,
                                     int key) {
  if (rules.softcap != 0.f) {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) x[i] = rules.cap * ptx::tanh_approx(x[i] * rules.uncap);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = query + 8 * r, here = row + s.offset() - key;  // where the query stands, seen from `key`
    const int first = here - rules.left, last = min(here + rules.right, s.keys - 1 - key);
    if (rules.bias && row < s.queries) {
      const float* const bias = rules.bias + b * rules.bias_batch + head * rules.bias_head + row * rules.bias_row + key;
#pragma unroll
      for (int i = 2 * r; i < n / 2; i += 4)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (8 * (i / 4) + j <= last) x[i + j] += bias[8 * (i / 4) + j] * rules.unscale;
    }
#pragma unroll
    for (int i = 2 * r; i < n / 2; i += 4)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (8 * (i / 4) + j < first || 8 * (i / 4) + j > last) x[i + j] = -INFINITY;
  }
}

inline void refuse(const std::string& reason) { throw std::invalid_argument("attention: " + reason); }

// Calls start(T()) with the element type of the problem.
template <class Start>
void for_type(const Problem& p, Start start) {
  if (p.type == DataType::bf16) start(__nv_bfloat16(0.f));
  else if (p.type == DataType::f16) start(__half(0.f));
  else refuse("the element type of q: expected bfloat16 or float16");
}

template <class T>
PTX_INLINE uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) return ptx::pack_f16(low, high);
  else return ptx::pack_bf16(low, high);
}

}  // namespace attention
