// What the Hopper steps (09-16) share: operands described to TMA, their tiles in shared memory, the multiplication of
// one stage by wgmma. The way back from accumulators to memory is in hopper_store.cuh.
//
// A stage holds tile_k = 64 values of k: of two bytes each, they are the 128 bytes that the widest swizzle permutes.
// Both orders of an operand fill rows * 128 bytes of a stage, and 64 rows of it always start at a multiple of 8192
// bytes:
//   K-major    (A as m x k, B as its n x k transpose)  one box: a row of 128 bytes for each m (or n)
//   MN-major   (A as its k x m transpose, B as k x n)  a box for each 64 of m (or n): a row of 128 bytes for each k
// TMA reads zeros outside of the matrices, so only stores look at sizes.
//
// Refused with std::invalid_argument, before any launch: types other than bf16 and f16, and f32 out but for step 16;
// addresses, row strides and batch strides of a and b that are no multiples of 16 bytes, which TMA cannot describe.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "matmul/epilogue.cuh"
#include "simt/ptx.cuh"

namespace matmul::hopper {

constexpr int tile_k = 64;
constexpr int warpgroup = 128;  // threads

PTX_INLINE int divide_up(int x, int y) { return (x + y - 1) / y; }

// ---- host: tensor maps ----
inline void refuse(const std::string& reason) { throw std::invalid_argument("matmul: " + reason); }

inline void check_describable(const std::string& operand, const void* address, int64_t row_bytes, int64_t batch_bytes) {
  if (uintptr_t(address) % 16)
    refuse("the address of " + operand + " is " + std::to_string(uintptr_t(address) % 16) +
           " bytes past a multiple of 16, expected a multiple of 16");
  if (row_bytes % 16)
    refuse("the row stride of " + operand + " is " + std::to_string(row_bytes) + " bytes, expected a multiple of 16");
  if (batch_bytes % 16)
    refuse("the batch stride of " + operand + " is " + std::to_string(batch_bytes) +
           " bytes, expected a multiple of 16");
}

// A batch of row-major matrices as TMA sees it. A matrix that the whole batch shares (stride 0) is a batch of one.
inline CUtensorMap matrix_map(const void* address, DataType type, int64_t rows, int64_t columns, int64_t row_stride,
                              int64_t batch, int64_t batch_stride, int box_rows, int box_columns,
                              simt::L2Promotion promotion = simt::L2Promotion::b256) {
  const int64_t size = simt::size_of(type);
  const int64_t planes = batch_stride ? batch : 1, plane = batch_stride ? batch_stride : row_stride;
  const simt::TensorShape shape{3,
                                {uint64_t(columns), uint64_t(rows), uint64_t(planes)},
                                {uint64_t(row_stride * size), uint64_t(plane * size)},
                                {uint32_t(box_columns), uint32_t(box_rows), 1}};
  return simt::tensor_map(address, type, shape, simt::Swizzle::b128, promotion);
}

// The maps of a and b. `rows_a` and `rows_b`: how many of m and n one load brings, where the operand is K-major.
struct Operands {
  CUtensorMap a, b;
  int batch_a, batch_b;  // what a step in the batch adds to the map's coordinate: 0 where all share one matrix
};
inline Operands describe(const Problem& p, int rows_a, int rows_b) {
  const int64_t size = simt::size_of(p.in);
  check_describable("a", p.a, p.lda * size, p.batch > 1 ? p.stride_a * size : 0);
  check_describable("b", p.b, p.ldb * size, p.batch > 1 ? p.stride_b * size : 0);
  const int64_t stride_a = p.batch > 1 ? p.stride_a : 0, stride_b = p.batch > 1 ? p.stride_b : 0;
  return {p.transpose_a ? matrix_map(p.a, p.in, p.k, p.m, p.lda, p.batch, stride_a, tile_k, 64)
                        : matrix_map(p.a, p.in, p.m, p.k, p.lda, p.batch, stride_a, rows_a, tile_k),
          p.transpose_b ? matrix_map(p.b, p.in, p.n, p.k, p.ldb, p.batch, stride_b, rows_b, tile_k)
                        : matrix_map(p.b, p.in, p.k, p.n, p.ldb, p.batch, stride_b, tile_k, 64),
          stride_a != 0, stride_b != 0};
}

// Calls Step<In, a_mn_major, b_mn_major>::launch(problem, rest...) for the problem's inputs and layouts. static:
// compilers take a template for external although its argument is a Step of an anonymous namespace, and the linker
// then keeps one dispatch<(anonymous)::Step> for all steps.
template <template <class, bool, bool> class Step, class In, class... Rest>
static void dispatch_layouts(const Problem& p, Rest... rest) {
  if (p.transpose_a && p.transpose_b) Step<In, true, false>::launch(p, rest...);
  else if (p.transpose_a) Step<In, true, true>::launch(p, rest...);
  else if (p.transpose_b) Step<In, false, false>::launch(p, rest...);
  else Step<In, false, true>::launch(p, rest...);
}
template <class Start>
static void dispatch_inputs(const Problem& p, Start start) {
  constexpr int largest = 0x7fffffff - 1024;  // and a tile more: still an int
  if (p.m > largest || p.n > largest || p.k > largest)
    refuse("sizes " + std::to_string(p.m) + ", " + std::to_string(p.n) + " and " + std::to_string(p.k) +
           ", expected at most 2^31 - 1025");
  if (p.in != DataType::bf16 && p.in != DataType::f16)
    refuse("inputs have element type " + std::to_string(int(p.in)) + ", expected bf16 (9) or f16 (6)");
  if (p.out != p.in && p.out != DataType::f32)
    refuse("the output has element type " + std::to_string(int(p.out)) + ", expected that of the inputs or f32 (7)");
  if (p.activation == Activation::swiglu && p.n % 2)
    refuse("swiglu takes pairs of columns, expected an even n, got " + std::to_string(p.n));
  p.in == DataType::bf16 ? start(__nv_bfloat16(0.f)) : start(__half(0.f));
}
template <template <class, bool, bool> class Step, class... Rest>
static void dispatch(const Problem& p, Rest... rest) {
  dispatch_inputs(p, [&](auto in) { dispatch_layouts<Step, decltype(in)>(p, rest...); });
}
// The same for steps that write the type of their inputs alone.
template <template <class, bool, bool> class Step>
static void dispatch_same_type(const Problem& p) {
  if (p.out == DataType::f32 && p.in != DataType::f32)
    refuse("this step writes the type of its inputs; steps 08 and 16 write f32 too");
  dispatch<Step>(p);
}
// The same for tiles that only have a row-major and b transposed.
template <template <class, bool, bool> class Step, class... Rest>
static void dispatch_row_column(const Problem& p, Rest... rest) {
  if (p.transpose_a || !p.transpose_b) refuse("this tile takes a as m x k and b as n x k, expected transpose_b alone");
  dispatch_inputs(p, [&](auto in) { Step<decltype(in), false, false>::launch(p, rest...); });
}

// ---- what a kernel is told of the problem, and where its tiles lie ----
struct Sizes {
  int m, n, k, batch;
  int batch_a, batch_b;
  static Sizes of(const Problem& p, const Operands& operands) {
    return {p.m, p.n, p.k, p.batch, operands.batch_a, operands.batch_b};
  }
};
struct Tile {
  int row, column, batch;  // of the first element
};
// Tiles by rows, as if there were no cache.
template <int tile_m, int tile_n>
PTX_INLINE Tile tile_by_rows(const Sizes& sizes, int index) {
  const int across = divide_up(sizes.n, tile_n), down = divide_up(sizes.m, tile_m);
  return {index / across % down * tile_m, index % across * tile_n, index / (across * down)};
}
// Tiles in groups of `group` rows, walked column by column, so that those that run at the same time form a patch and
// share rows and columns in L2. Every other group is walked backwards: it starts with the columns that were read
// last.
template <int tile_m, int tile_n>
PTX_INLINE Tile tile_in_groups(const Sizes& sizes, int group, int index) {
  const int across = divide_up(sizes.n, tile_n), down = divide_up(sizes.m, tile_m);
  const int batch = index / (across * down), place = index % (across * down);
  const int first = place / (group * across) * group, height = min(group, down - first);
  const int within = place - first * across, column = within / height;
  return {(first + within % height) * tile_m, (first / group % 2 ? across - 1 - column : column) * tile_n, batch};
}
template <int tile_m, int tile_n>
PTX_INLINE int count_tiles(const Sizes& sizes) {
  return divide_up(sizes.m, tile_m) * divide_up(sizes.n, tile_n) * sizes.batch;
}
inline unsigned count_tiles(const Problem& p, int tile_m, int tile_n) {
  const int64_t tiles = int64_t((p.m + tile_m - 1) / tile_m) * ((p.n + tile_n - 1) / tile_n) * p.batch;
  if (tiles > 0x7fffffff) refuse(std::to_string(tiles) + " tiles, expected fewer than 2^31");
  return unsigned(tiles);
}
// How many blocks walk over the tiles of clusters: as many as fit, or fewer if those need no more rounds. Of 512 tiles
// on 66 clusters the last round would have 50; 64 clusters take eight rounds too, stay in step with groups of eight
// rows, and leave their power to others.
inline unsigned persistent_blocks(unsigned tiles, unsigned cluster) {
  const unsigned most = std::max(1u, unsigned(simt::multiprocessors()) / cluster);
  const unsigned rounds = (tiles - 1) / most + 1;
  return ((tiles - 1) / rounds + 1) * cluster;
}

// ---- the ring of stages ----
// Stage and parity of the next use. A consumer waits for `parity` of a full barrier, a producer for the other parity
// of an empty barrier: it finds a fresh ring empty.
template <int stages>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;
  PTX_INLINE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Blocks of a cluster tell each other that they have started. There is nothing to publish: barriers have been fenced,
// and a release at cluster scope would wait for L2.
PTX_INLINE void cluster_meet() {
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}

// How a producer of a cluster ends: every stage is empty once more. So all arrivals of the other blocks are here, all
// that was multicast has landed, and nobody reaches into this block or waits for it any more: it may leave. A cluster
// barrier would not do, it does not wait for arrivals that are still on their way.
template <int stages>
PTX_INLINE void drain(uint64_t (&empty)[stages], Cursor<stages> cursor) {
  for (int i = 0; i < stages; ++i, cursor.advance()) ptx::mbarrier_wait(&empty[cursor.stage], cursor.parity ^ 1);
}

// ---- a stage: loaded by one thread, multiplied by warpgroups ----
// The plain load; with an L2 policy; into every block of the cluster whose bit is set in `blocks`, counting on each
// one's barrier; with both.
template <int rows, bool mn_major, class Load>
PTX_INLINE void each_box(int k, int row, Load load) {
  static_assert(rows % (mn_major ? 64 : 8) == 0, "whole boxes, whole swizzle patterns");
  if constexpr (!mn_major) {
    load(0, k, row);
  } else {
#pragma unroll
    for (int i = 0; i < rows; i += 64) load(i * tile_k, row + i, k);
  }
}
template <int rows, bool mn_major, class In>
PTX_INLINE void load_rows(In* to, const CUtensorMap* map, uint64_t* barrier, int k, int row, int batch) {
  each_box<rows, mn_major>(k, row, [&](int at, int x, int y) { ptx::tma_load(to + at, map, barrier, x, y, batch); });
}
template <int rows, bool mn_major, class In>
PTX_INLINE void load_rows_hint(In* to, const CUtensorMap* map, uint64_t* barrier, ptx::CacheHint hint, int k, int row,
                               int batch) {
  each_box<rows, mn_major>(
      k, row, [&](int at, int x, int y) { ptx::tma_load_hint(to + at, map, barrier, hint, x, y, batch); });
}
template <int rows, bool mn_major, class In>
PTX_INLINE void load_rows_multicast(In* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks, int k, int row,
                                    int batch) {
  each_box<rows, mn_major>(
      k, row, [&](int at, int x, int y) { ptx::tma_load_multicast(to + at, map, barrier, blocks, x, y, batch); });
}
template <int rows, bool mn_major, class In>
PTX_INLINE void load_rows_multicast_hint(In* to, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks,
                                         ptx::CacheHint hint, int k, int row, int batch) {
  each_box<rows, mn_major>(k, row, [&](int at, int x, int y) {
    ptx::tma_load_multicast_hint(to + at, map, barrier, blocks, hint, x, y, batch);
  });
}

template <bool mn_major, class In>
PTX_INLINE uint64_t stage_descriptor(const In* tile) {
  return ptx::matrix_descriptor(tile, simt::Swizzle::b128, mn_major ? 64 * tile_k * sizeof(In) : 16, 1024);
}

// d (64 x n) = or += 64 rows of A times n rows of B over the k of one stage. Issued, neither committed nor waited for.
template <int n, class In, bool a_mn_major, bool b_mn_major>
PTX_INLINE void multiply_stage(float (&d)[n / 2], const In* a, const In* b, bool accumulate) {
  const uint64_t descriptor_a = stage_descriptor<a_mn_major>(a), descriptor_b = stage_descriptor<b_mn_major>(b);
  constexpr int step_a = (a_mn_major ? 2048 : 32) >> 4, step_b = (b_mn_major ? 2048 : 32) >> 4;  // 16 values of k
#pragma unroll
  for (int i = 0; i < tile_k / 16; ++i)
    ptx::wgmma<n, In, a_mn_major, b_mn_major>(d, descriptor_a + i * step_a, descriptor_b + i * step_b,
                                              accumulate || i > 0);
}

// A consumer's part of one tile: its 64 rows times all columns, over `steps` stages of the ring. One stage is
// multiplied while the next is already issued, so the tensor cores never wait for an arrival; `release(stage)` says
// that this warpgroup is done with a stage; `issued()` is called once a stage has been handed to the tensor cores.
struct Nothing {
  PTX_INLINE void operator()() const {}
};
template <int n, bool a_mn_major, bool b_mn_major, class Shared, int stages, class Release, class Issued = Nothing>
PTX_INLINE void multiply_tile(float (&d)[n / 2], Shared& shared, Cursor<stages>& cursor, int steps, int consumer,
                              Release release, Issued issued = {}) {
  int previous = -1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, cursor.advance()) {
    const int stage = cursor.stage;
    ptx::mbarrier_wait(&shared.full[stage], cursor.parity);
    ptx::wgmma_fence();
    multiply_stage<n, std::remove_reference_t<decltype(shared.a[0][0])>, a_mn_major, b_mn_major>(
        d, shared.a[stage] + consumer * 64 * tile_k, shared.b[stage], step > 0);
    ptx::wgmma_commit_group();
    issued();
    ptx::wgmma_wait_group<1>();
    if (previous >= 0) release(previous);
    previous = stage;
  }
  ptx::wgmma_wait_group<0>();
  release(previous);
}

}  // namespace matmul::hopper
