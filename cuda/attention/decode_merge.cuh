// Parts of a softmax over different keys become one: those of warps inside a block, and those of splits in a kernel of
// its own. A part is the largest score, the sum of exp(score - most), and the output under the same `most`, not divided
// by the sum. So a part's weight is exp of a difference of scores, which is exact where scores are large: a part's lse
// would have been rounded to 1e-3 at 1e4 already.
#pragma once
#include "attention/decode.h"
#include "attention/softmax.cuh"

namespace attention::decoding {
namespace {

struct State {
  float most = -INFINITY, sum = 0.f;  // scores in units of 1 / scale
};

// Four neighbouring columns of a row: look at the states of all parts, then add all parts. Four, because 32 lanes then
// read and write one line after the other, floats and halves alike.
struct Merge {
  static constexpr int columns = 4;
  const float scale_log2;
  State state;
  float o[columns] = {};

  PTX_INLINE Merge(float scale) : scale_log2(scale * log2_e) {}
  PTX_INLINE void look_at(const State& part) { state.most = max(state.most, part.most); }
  // The output of a part that saw nothing may be anything: it is not read. No branch, so that loads of several parts
  // can be on their way at once.
  PTX_INLINE void add(const State& part, const float* part_o) {
    const bool dead = part.most == -INFINITY;
    const float weight = dead ? 0.f : ptx::exp2_approx((part.most - state.most) * scale_log2);
    const float4 x = dead ? make_float4(0.f, 0.f, 0.f, 0.f) : *reinterpret_cast<const float4*>(part_o);
    state.sum += weight * part.sum;
    o[0] += weight * x.x, o[1] += weight * x.y, o[2] += weight * x.z, o[3] += weight * x.w;
  }
};

struct Results {
  float *lse, *split_o;
  State* split_state;
  const float* sink;
  int rows;  // B * H * T
  static Results of(const Decode& p) {
    return {p.lse, p.split_o, reinterpret_cast<State*>(p.split_state), p.sink, p.batch * p.heads * p.queries};
  }

  // Columns of a row, divided by the sum, and its lse, by the thread that `keeps_lse`.
  template <class T>
  PTX_INLINE void store(const Merge& x, T* to, int row, int head, bool keeps_lse) const {
    const float seen = x.state.most * x.scale_log2, beside = sink ? sink[head] * log2_e : -INFINITY;
    const float top = max(seen, beside);
    const bool dead = top == -INFINITY;
    const float shrunk = dead ? 0.f : ptx::exp2_approx(seen - top);  // 1 unless the sink is above all scores
    const float sum = dead ? 1.f : x.state.sum * shrunk + ptx::exp2_approx(beside - top);
    const float factor = shrunk / sum;
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack<T>(x.o[0] * factor, x.o[1] * factor), pack<T>(x.o[2] * factor, x.o[3] * factor));
    if (keeps_lse) lse[row] = (top + log2f(sum)) * ln_2;
  }
  PTX_INLINE int64_t part(int split, int row) const { return int64_t(split) * rows + row; }
  PTX_INLINE void store_split(const Merge& x, int row, int split, int head_dim, int column) const {
    if (column == 0) split_state[part(split, row)] = x.state;
    if (x.state.most == -INFINITY) return;
    float* const to = split_o + part(split, row) * head_dim + column;
    *reinterpret_cast<float4*>(to) = make_float4(x.o[0], x.o[1], x.o[2], x.o[3]);
  }
};

constexpr int merge_warps = 4;

// A warp has a row. Its lanes look at the states of 32 splits at once; then each has four columns, and those 128 on.
template <class T>
__global__ void __launch_bounds__(32 * merge_warps)
    merge_splits(Results results, Rows<T> o, int heads, int queries, int head_dim, int splits, float scale) {
  const int row = blockIdx.x * merge_warps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= results.rows) return;
  float top = -INFINITY;
#pragma unroll 1
  for (int s = lane; s < splits; s += 32) top = max(top, results.split_state[results.part(s, row)].most);
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) top = max(top, __shfl_xor_sync(0xffffffff, top, bit));

  const int token = row % queries, head = row / queries % heads, b = row / queries / heads;
#pragma unroll 1
  for (int column = lane * Merge::columns; column < head_dim; column += 32 * Merge::columns) {
    Merge merged(scale);
    merged.state.most = top;
    const State* state = results.split_state + row;
    const float* part = results.split_o + int64_t(row) * head_dim + column;
    const int64_t step = int64_t(results.rows) * head_dim;
#pragma unroll 4
    for (int s = 0; s < splits; ++s, state += results.rows, part += step) merged.add(*state, part);
    results.store(merged, o.at(b, token, head) + column, row, head, column == 0);
  }
}

template <class T>
void start_merge(const Decode& p) {
  simt::Launch shape;
  shape.grid = dim3(divide_up(p.batch * p.heads * p.queries, merge_warps));
  shape.block = dim3(32 * merge_warps);
  shape.stream = p.stream;
  simt::launch(merge_splits<T>, shape, Results::of(p), Rows<T>::of(p.o), p.heads, p.queries, p.head_dim, p.splits,
               p.scale);
}

}  // namespace
}  // namespace attention::decoding
