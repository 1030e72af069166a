// Cross-entropy of a row of logits: how the row is cut, its softmax's denominator, and its gradient. Two kernels in
// cross_entropy.cu are made of these.
#pragma once
#include "fused/training.cuh"

namespace fused::cross_entropy {

using namespace training;

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;
constexpr int most_threads = 512;
constexpr int at_once = 4;  // loads of 16 bytes a thread starts before it uses the first

struct Problem {
  const void* logits;
  void* gradient;  // null: none; may be the logits
  const int64_t* targets;
  float2* statistics;   // (largest, sum) of each row; null: not wanted
  float* loss;          // null: not wanted
  const float* scales;  // of the cross-entropy's gradient and of that of lse^2; null: 1 and 0
  int64_t logits_stride, gradient_stride, ignore_index;
  int columns;
  float softcap;      // 0: none
  bool skip_ignored;  // there is no lse^2: rows to be ignored have gradient zero and need not be read
  bool keep;          // the row fits into shared memory
};

// One row, cut into a few elements up to a multiple of 16 bytes, pieces of 16 bytes, and a few elements more. Without
// pieces if the two arrays do not reach such a multiple at the same column.
template <class T>
struct Row {
  const T* x;
  T* gradient;
  int columns, head, pieces;

  PTX_INLINE Row(const Problem& p, int64_t row) : columns(p.columns) {
    x = static_cast<const T*>(p.logits) + row * p.logits_stride;
    gradient = p.gradient ? static_cast<T*>(p.gradient) + row * p.gradient_stride : nullptr;
    head = before_16(x);
    if (head > columns || (gradient && before_16(gradient) != head)) head = columns;
    pieces = (columns - head) / width<T>;
  }
  PTX_INLINE int column(int piece) const { return head + piece * width<T>; }
  PTX_INLINE const uint4* piece(int i) const { return reinterpret_cast<const uint4*>(x + column(i)); }

  // Calls element(column) for what is in no piece; the block's threads share them.
  template <class Element>
  PTX_INLINE void for_ends(Element element) const {
    const int tail = column(pieces), ends = head + columns - tail;
    for (int i = threadIdx.x; i < ends; i += blockDim.x) element(i < head ? i : tail + i - head);
  }
};

// cap * tanh(x / cap) by exponentials: tanh.approx has 11 bits.
struct Cap {
  float cap, twice_log2_e;

  PTX_INLINE explicit Cap(float cap) : cap(cap), twice_log2_e(cap > 0.f ? 2.f * log2_e / cap : 0.f) {}
  PTX_INLINE float tanh(float x) const { return 1.f - __fdividef(2.f, ptx::exp2_approx(x * twice_log2_e) + 1.f); }
  PTX_INLINE float value(float x) const { return cap > 0.f ? cap * tanh(x) : x; }
  template <int n>
  PTX_INLINE void apply(float (&x)[n]) const {
    if (cap > 0.f)
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = cap * tanh(x[i]);
  }
};

PTX_INLINE float exp_of_difference(float x, float y) { return ptx::exp2_approx((x - y) * log2_e); }

// The softmax's denominator while logits come: what was summed under an older `most` shrinks.
struct Sum {
  float most = -INFINITY, sum = 0.f;

  template <int n>
  PTX_INLINE void add(const float (&x)[n]) {
    float top = most;
#pragma unroll
    for (int i = 0; i < n; ++i) top = max(top, x[i]);
    const float shift = top == -INFINITY ? 0.f : top;
    sum *= exp_of_difference(most, shift);
#pragma unroll
    for (int i = 0; i < n; ++i) sum += exp_of_difference(x[i], shift);
    most = top;
  }
  PTX_INLINE void add(Sum other) {
    const float top = max(most, other.most), shift = top == -INFINITY ? 0.f : top;
    sum = sum * exp_of_difference(most, shift) + other.sum * exp_of_difference(other.most, shift);
    most = top;
  }
};

struct Shared {
  Sum of_warp[most_threads / 32];
  // The kept pieces of the row follow. Each thread reads those that it wrote.
  PTX_INLINE uint4* kept() { return reinterpret_cast<uint4*>(this + 1); }
};
static_assert(sizeof(Shared) % 16 == 0, "the pieces are aligned");

template <class T>
PTX_INLINE Sum read_row(const Row<T>& row, const Cap& cap, uint4* kept) {
  Sum sum;
  row.for_ends([&](int column) {
    const float x[1] = {cap.value(float(row.x[column]))};
    sum.add(x);
  });
#pragma unroll 1
  for (int first = threadIdx.x; first < row.pieces; first += at_once * blockDim.x) {
    uint4 words[at_once];
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (first + j * int(blockDim.x) < row.pieces) words[j] = *row.piece(first + j * blockDim.x);
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      const int i = first + j * int(blockDim.x);
      if (i >= row.pieces) break;
      if (kept) kept[i] = words[j];
      float x[width<T>];
      unpack<T>(words[j], x);
      cap.apply(x);
      sum.add(x);
    }
  }
  return sum;
}

// Over the block, in every thread, in a fixed order.
PTX_INLINE Sum total(Sum mine, Shared& shared) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) {
    Sum other;
    other.most = __shfl_xor_sync(0xffffffff, mine.most, bits);
    other.sum = __shfl_xor_sync(0xffffffff, mine.sum, bits);
    mine.add(other);
  }
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Sum all;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) all.add(shared.of_warp[warp]);
  return all;
}

// What turns logits of a row into gradients: factor * exp(logit - most) - at_target * [column is the target].
struct Gradient {
  float most, factor, at_target;
  int target;
  Cap cap;

  PTX_INLINE Gradient(const Problem& p, const Sum& all, int64_t target_, bool ignored)
      : most(all.most), target(int(target_)), cap(p.softcap) {
    const float scale = p.scales ? p.scales[0] : 1.f, square = p.scales ? p.scales[1] : 0.f;
    const bool outside = target_ < 0 || target_ >= p.columns;
    at_target = ignored ? 0.f : outside ? NAN : scale;
    if (outside) target = -1;
    const float lse = all.most + log2f(all.sum) * ln_2;
    factor = (at_target + (square == 0.f ? 0.f : 2.f * square * lse)) / all.sum;
  }
  template <int n>
  PTX_INLINE void apply(float (&x)[n], int column) const {
    if (cap.cap > 0.f) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float t = cap.tanh(x[i]), d = factor * exp_of_difference(cap.cap * t, most);
        x[i] = (d - (target - column == i ? at_target : 0.f)) * (1.f - t * t);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = factor * exp_of_difference(x[i], most);
    if (unsigned(target - column) >= unsigned(n)) return;
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] -= target - column == i ? at_target : 0.f;
  }
  template <class T>
  PTX_INLINE void write_end(const Row<T>& row, int column) const {
    float x[1] = {float(row.x[column])};
    apply(x, column);
    row.gradient[column] = T(x[0]);
  }
  template <class T>
  PTX_INLINE void write_piece(const Row<T>& row, int piece, const uint4& words) const {
    float x[width<T>];
    unpack<T>(words, x);
    apply(x, row.column(piece));
    *reinterpret_cast<uint4*>(row.gradient + row.column(piece)) = pack<T>(x);
  }
};

template <class T>
PTX_INLINE void write_zeros(const Row<T>& row) {
  row.for_ends([&](int column) { row.gradient[column] = T(0.f); });
  for (int i = threadIdx.x; i < row.pieces; i += blockDim.x)
    *reinterpret_cast<uint4*>(row.gradient + row.column(i)) = make_uint4(0, 0, 0, 0);
}

}  // namespace fused::cross_entropy
