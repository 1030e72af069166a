// Cross-entropy of rows of logits, and its gradient with respect to them, without log-probabilities in memory.
//
//   cross_entropy            loss, statistics and gradient in one pass: a block reads a row once, keeps its pieces of
//                            16 bytes in shared memory, and writes the gradient from there, over the logits if told so
//   cross_entropy_gradient   the gradient alone, from the statistics of an earlier pass, times a factor then known
//
// Bytes a logit, for elements of E bytes: the first reads E and writes E (without a gradient it only reads; it reads 2
// E where a row does not fit into shared memory); the second reads E and writes E. The rest grows with rows, not
// logits.
//
// The statistics of a row are its largest logit and the sum of exp(logit - largest), not their logarithm: a log-sum-exp
// of 10^4 in float32 is known to 5e-4 only, and so would be every probability made from it.
// A row whose target is outside of the vocabulary gets a loss and a gradient of NaN: nothing here can raise from a GPU.
#include "fused/cross_entropy.cuh"
#include "native/operation.h"

namespace fused::cross_entropy {
namespace {

using native::Arguments, native::DataType, native::View;

// A block has a row. Up to 64 registers, so that two blocks of a long row share a multiprocessor: one reads or writes
// while the other has its barrier.
template <class T>
__global__ void __launch_bounds__(most_threads, 2) one_pass(Problem p) {
  auto& shared = simt::dynamic_shared<Shared>();
  const Row<T> row(p, blockIdx.x);
  const int64_t target = p.targets[blockIdx.x];
  const bool ignored = target == p.ignore_index, outside = target < 0 || target >= p.columns;
  if (ignored && p.skip_ignored) {
    if (row.gradient) write_zeros(row);
    if (threadIdx.x == 0 && p.loss) p.loss[blockIdx.x] = 0.f;
    if (threadIdx.x == 0 && p.statistics) p.statistics[blockIdx.x] = make_float2(0.f, 1.f);
    return;
  }
  const Cap cap(p.softcap);
  uint4* const kept = p.keep ? shared.kept() : nullptr;
  // Before the barrier: after it others may write gradients there.
  const float at_target = threadIdx.x == 0 && !outside ? cap.value(float(row.x[target])) : NAN;
  const Sum all = total(read_row(row, cap, kept), shared);
  if (threadIdx.x == 0) {
    if (p.loss) p.loss[blockIdx.x] = ignored ? 0.f : log2f(all.sum) * ln_2 - (at_target - all.most);
    if (p.statistics) p.statistics[blockIdx.x] = make_float2(all.most, all.sum);
  }
  if (!row.gradient) return;
  const Gradient gradient(p, all, target, ignored);
  row.for_ends([&](int column) { gradient.write_end(row, column); });
#pragma unroll 2
  for (int i = threadIdx.x; i < row.pieces; i += blockDim.x)
    gradient.write_piece(row, i, kept ? kept[i] : *row.piece(i));
}

// blockIdx.x is the row, blockIdx.y the part of it: at_once pieces a thread.
template <class T>
__global__ void __launch_bounds__(most_threads, 2) gradient_alone(Problem p) {
  const Row<T> row(p, blockIdx.x);
  const int64_t target = p.targets[blockIdx.x];
  const int first = blockIdx.y * at_once * blockDim.x + threadIdx.x;
  if (target == p.ignore_index && p.skip_ignored) {
    if (blockIdx.y == 0) row.for_ends([&](int column) { row.gradient[column] = T(0.f); });
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (const int i = first + j * blockDim.x; i < row.pieces)
        *reinterpret_cast<uint4*>(row.gradient + row.column(i)) = make_uint4(0, 0, 0, 0);
    return;
  }
  uint4 words[at_once];
#pragma unroll
  for (int j = 0; j < at_once; ++j)
    if (const int i = first + j * blockDim.x; i < row.pieces) words[j] = *row.piece(i);
  const float2 statistics = p.statistics[blockIdx.x];
  Sum all;
  all.most = statistics.x, all.sum = statistics.y;
  const Gradient gradient(p, all, target, target == p.ignore_index);
  if (blockIdx.y == 0) row.for_ends([&](int column) { gradient.write_end(row, column); });
#pragma unroll
  for (int j = 0; j < at_once; ++j)
    if (const int i = first + j * blockDim.x; i < row.pieces) gradient.write_piece(row, i, words[j]);
}

// ---- the operations -------------------------------------------------------------------------------------------------

// Type, sizes and addresses of a matrix of rows that lie without gaps inside.
int64_t stride_of(const View& x) {
  if ((x.size[1] > 1 && x.stride[1] != 1) || (x.size[0] > 1 && x.stride[0] < x.size[1]))
    x.refuse("strides " + x.strides() + ": expected rows without gaps inside, one after the other; call .contiguous()");
  return x.size[0] > 1 ? x.stride[0] : x.size[1];
}

const View& floats(const View& x, std::initializer_list<int64_t> shape) {
  return x.expect_type({DataType::f32}).expect_shape(shape).expect_contiguous();
}

Problem problem_of(const Arguments& given) {
  Problem p = {};
  const View& logits = given.array("logits").expect_rank(2);
  logits.expect_type({DataType::f32, DataType::bf16, DataType::f16});
  const int64_t rows = logits.size[0];
  if (rows < 1 || rows > 0x7fffffff || logits.size[1] < 1 || logits.size[1] > (1 << 30))
    logits.refuse("shape " + logits.shape() + ": expected at least one row of 1 to 2^30 columns");
  p.logits = logits.data, p.logits_stride = stride_of(logits), p.columns = int(logits.size[1]);
  if (const View* const gradient = given.optional("gradient")) {
    gradient->expect_type({logits.type}).expect_shape({rows, logits.size[1]}).expect_writable();
    p.gradient = gradient->data, p.gradient_stride = stride_of(*gradient);
    const bool same = p.gradient == p.logits && p.gradient_stride == p.logits_stride;
    if (!same && gradient->data < logits.data + logits.bytes() && logits.data < gradient->data + gradient->bytes())
      gradient->refuse("overlaps the logits: expected the same memory, or other memory");
  }
  const View& targets = given.array("targets").expect_type({DataType::i64}).expect_shape({rows});
  p.targets = targets.expect_contiguous().as<int64_t>();
  if (const View* const x = given.optional("statistics"))
    p.statistics = floats(*x, {rows, 2}).expect_aligned(8).as<float2>();
  if (const View* const x = given.optional("scales")) p.scales = floats(*x, {2}).as<float>();
  p.ignore_index = int64_t(given.number("ignore_index"));
  p.softcap = float(given.number("softcap"));
  if (!(p.softcap >= 0.f && p.softcap < INFINITY))
    throw std::invalid_argument("softcap: expected 0 or a positive number");
  p.skip_ignored = given.flag("skip_ignored");
  return p;
}

// Calls with_type with a value of the elements' type.
template <class WithType>
void for_type(DataType type, WithType with_type) {
  if (type == DataType::f32) with_type(float{});
  else if (type == DataType::bf16) with_type(__nv_bfloat16{});
  else with_type(__half{});
}

// A thread for each `at_once` pieces, of warps that are whole.
int threads_for(int64_t pieces) {
  const int64_t warps = (pieces + 32 * at_once - 1) / (32 * at_once);
  return 32 * int(warps < 1 ? 1 : warps < most_threads / 32 ? warps : most_threads / 32);
}

void run_one_pass(const Arguments& given) {
  Problem p = problem_of(given);
  const View& logits = given.array("logits");
  if (const View* const loss = given.optional("loss"))
    p.loss = floats(*loss, {logits.size[0]}).expect_writable().as<float>();
  const int64_t bytes = (int64_t(p.columns) * simt::size_of(logits.type) + 15) / 16 * 16;
  p.keep = p.gradient && int64_t(sizeof(Shared)) + bytes <= given.integer("shared_bytes");
  const size_t shared = sizeof(Shared) + (p.keep ? size_t(bytes) : 0);
  const dim3 rows(unsigned(logits.size[0])), threads(threads_for(bytes / 16));
  const simt::Launch shape{rows, threads, shared, 1, false, given.stream};
  for_type(logits.type, [&](auto type) { simt::launch(one_pass<decltype(type)>, shape, p); });
}

void run_gradient(const Arguments& given) {
  const Problem p = problem_of(given);
  const View& logits = given.array("logits");
  if (!p.gradient || !p.statistics) throw std::invalid_argument("gradient, statistics: expected both");
  const int64_t pieces = (int64_t(p.columns) * simt::size_of(logits.type) + 15) / 16;
  int threads = threads_for(pieces);
  if (threads > 256) threads = 256;
  const dim3 grid(unsigned(logits.size[0]), unsigned((pieces + at_once * threads - 1) / (at_once * threads)));
  if (grid.y > 65535) logits.refuse("shape " + logits.shape() + ": expected at most 2^28 columns");
  const simt::Launch shape{grid, dim3(threads), 0, 1, false, given.stream};
  for_type(logits.type, [&](auto type) { simt::launch(gradient_alone<decltype(type)>, shape, p); });
}

const native::Operation one_pass_operation("cross_entropy", run_one_pass);
const native::Operation gradient_operation("cross_entropy_gradient", run_gradient);

}  // namespace
}  // namespace fused::cross_entropy
