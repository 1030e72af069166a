// What attention is here, and the steps of its two ladders. No CUDA types: launchers and operations.cpp include this.
//
//   o_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   lse_i = log(sum_j exp(s_ij) [+ exp(sink)])
//   s_ij = cap(scale q_i . k_j) + bias_ij,   cap(x) = softcap tanh(x / softcap), or x where softcap is 0
//
// over the keys j that query i sees: -left <= j - (i + keys - queries) <= right. So the last query stands at the last key;
// causal is right = 0, a window of w tokens is left = w - 1. A query that sees nothing has o = 0 and lse = -inf.
// Letters: B batch, T queries, S keys, H query heads, G key/value heads (H a multiple), K head width. Head h reads h / (H/G).
#pragma once
#include <cstdint>

#include "simt/types.h"

namespace attention {

using simt::DataType;

constexpr int everything = 1 << 30;  // left or right without a limit

// q, k, v, o and their gradients: the K elements of a row are contiguous; strides in elements, multiples of 8, and
// addresses multiples of 16 bytes (checked by operations.cpp), so that TMA and 16-byte copies can take them.
struct Tensor {
  void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
};

struct Problem {
  int batch, heads, kv_heads, head_dim;
  int queries, keys;  // of each sequence, or of the longest one where lengths vary
  // Sequences of different length, packed one after the other: sequence b has rows starts[b] .. starts[b + 1] - 1, and the
  // batch strides are 0. Null: all are as long. Both or none.
  const int32_t *starts_q = nullptr, *starts_k = nullptr;
  int total_queries, total_keys;  // rows of all sequences: batch * queries where all are as long
  DataType type;                  // of q, k, v, o: bf16 or f16
  Tensor q, k, v, o;
  float* lse;           // (B, H, T), or (H, total_queries) where lengths vary: natural logarithm
  int64_t lse_batch, lse_head;  // its strides; lse_batch is 0 where lengths vary
  float scale, softcap = 0.f;
  int left = everything, right = everything;
  const float* sink = nullptr;  // (H): a score without a value, which only adds to the denominator
  const float* bias = nullptr;  // added to the scores; -inf hides. Not with sequences of different length
  int64_t bias_batch = 0, bias_head = 0, bias_row = 0;  // strides; 0 where all share; keys are contiguous
  void* stream = nullptr;
};

// The backward pass: Problem holds the forward pass' inputs and results. delta_i = do_i . o_i - d_lse_i, laid out like lse.
// dq is summed in float32 by those steps that cut it along the keys, into `dq_sum`, which the step zeroes itself, and
// then converted: heads * (total_queries + 128 * batch) * K floats, in whatever order the step likes.
struct Backward {
  Problem forward;
  Tensor d_o, dq, dk, dv;  // of the type of q
  const float* d_lse = nullptr;  // gradient of lse, in its layout; null: zero
  float* delta;            // workspace
  float* dq_sum;           // workspace
  int32_t* turns;          // workspace, heads * (total_queries / 64 + batch) counters: whose turn it is to add to dq
  bool deterministic;      // add up dq in a fixed order: two runs give the same bits
};

// Each step starts its kernels and returns. They raise std::invalid_argument, before any launch, for head widths that
// they do not have. 01-03 take all of Problem; so do persistent_08 and best_09. 04-07, which are there to be read and
// measured, take head widths 64 and 128 of bf16, and all the rest.
namespace forward {
void naive_01(const Problem&, float* scores);  // scores: workspace of B * H * T * S floats
void online_02(const Problem&);
void mma_sync_03(const Problem&);              // any GPU from Ampere on
void wgmma_04(const Problem&);
void producer_05(const Problem&);
void ping_pong_06(const Problem&);
void overlap_07(const Problem&);
void persistent_08(const Problem&);
void best_09(const Problem&);
}  // namespace forward

// 01 and 02 take all of Backward, and so does best_05; 03 and 04 take head widths 64 and 128 of bf16, and all the rest.
namespace backward {
void recompute_01(const Backward&);
void mma_sync_02(const Backward&);
void wgmma_03(const Backward&);
void dq_reduce_04(const Backward&);
void best_05(const Backward&);
void compute_delta(const Backward&);  // delta of all rows: every step calls it first
}  // namespace backward

}  // namespace attention
