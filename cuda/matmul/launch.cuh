// What the steps of the ladder share beside their kernels: the checks before a launch, how a kernel sees A and B, which
// tile a block has, and the first tile loader. Nothing in here is about speed but the order of tiles.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "epilogue.cuh"
#include "matmul.h"
#include "simt/ptx.cuh"

namespace matmul {

__host__ __device__ constexpr int ceil_div(int dividend, int divisor) { return (dividend + divisor - 1) / divisor; }

// ---- operands ------------------------------------------------------------------------------------------------------
// A or B: `lines` vectors of `depth` = k elements. The lines of A are its rows, those of B its columns, so the kernels
// treat both alike and four layouts become two: neighbours in memory lie along_k (A as stored, B transposed) or not.
template <class T, bool along_k_>
struct Operand {
  static constexpr bool along_k = along_k_;
  const T* data;
  int64_t leading, batch_stride;
  int lines, depth;
  bool aligned;  // every row in memory starts at a multiple of 16 bytes

  static Operand of(const void* data, int64_t leading, int64_t batch_stride, int lines, int depth) {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && leading * int64_t(sizeof(T)) % 16 == 0 &&
                         batch_stride * int64_t(sizeof(T)) % 16 == 0;
    return {static_cast<const T*>(data), leading, batch_stride, lines, depth, aligned};
  }

  __device__ __forceinline__ bool inside(int line, int k) const { return line < lines && k < depth; }
  __device__ __forceinline__ const T* address(int line, int k) const {
    const int row = along_k ? line : k, column = along_k ? k : line;
    return data + blockIdx.z * batch_stride + row * leading + column;
  }
  // Zero outside of the matrix, so that no tile loop needs to know where the matrix ends.
  __device__ __forceinline__ T at(int line, int k) const { return inside(line, k) ? *address(line, k) : T(0.f); }
};

// ---- tiles ---------------------------------------------------------------------------------------------------------
struct Tile {
  int row, column;  // of its first element
};

// Blocks count through the tiles along blockIdx.x (y and z end at 65535). Neighbouring blocks run at the same time;
// with `group` rows of tiles walked together they want fewer different rows of A and columns of B, and L2 has them.
template <int tile_m, int tile_n, int group = 1>
__device__ __forceinline__ Tile tile_of_block(int m, int n) {
  const int rows = ceil_div(m, tile_m), columns = ceil_div(n, tile_n), block = blockIdx.x;
  const int first = block / (group * columns) * group, place = block % (group * columns);
  const int height = min(group, rows - first);
  return {(first + place % height) * tile_m, place / height * tile_n};
}

// The block copies `lines` from first_line on and `depth` k from first_k on: store(line, k, value) for each element,
// counted from that corner. Neighbouring threads read neighbouring addresses, whatever the layout.
template <int lines, int depth, int threads, class T, bool along_k, class Store>
__device__ __forceinline__ void load_slice(const Operand<T, along_k>& operand, int first_line, int first_k,
                                           Store store) {
  static_assert(lines * depth % threads == 0, "every thread copies as many");
#pragma unroll 8  // loads in flight a thread; more of them would spill beside the sums of step 08
  for (int done = 0; done < lines * depth; done += threads) {
    const int i = done + threadIdx.x;
    const int line = along_k ? i / depth : i % lines, k = along_k ? i % depth : i / lines;
    store(line, k, operand.at(first_line + line, first_k + k));
  }
}

// What one thread copies of each slice of an operand by cp.async: `count` runs of `width` neighbours in memory, at the
// same places of each slice. A place is 32 bits from the slice's corner, which all threads share; see `reaches`.
// Lines beyond the matrix may be copied from its last line: they only add to sums that are not stored. What lies beyond
// the last k becomes zero in both operands: 0 * NaN would be NaN.
template <int lines, int depth, int threads, int width, class T, bool along_k>
struct SliceCopy {
  static constexpr int across = (along_k ? depth : lines) / width, rows_apart = threads / across;
  static constexpr int count = lines * depth / width / threads;
  static_assert(threads % across == 0, "a thread's runs lie below each other");

  const char* corner;
  int64_t step;            // in bytes, from a slice to the next
  uint32_t offset[count];  // in bytes, from the corner
  int left;                // how many k there are from the corner on
  int line, k;             // of the first run
  int lines_left;          // from `line` on

  // True if the offsets of an operand fit into 32 bits.
  __host__ __device__ static bool reaches(const Operand<T, along_k>& operand) {
    return operand.leading < (int64_t(1) << 32) / int64_t(sizeof(T)) / (lines > depth ? lines : depth);
  }

  __device__ __forceinline__ SliceCopy(const Operand<T, along_k>& operand, int first_line) {
    const int down = threadIdx.x / across, along = threadIdx.x % across * width;
    line = along_k ? down : along, k = along_k ? along : down;
    left = operand.depth, lines_left = operand.lines - first_line - line;
    corner = reinterpret_cast<const char*>(operand.address(first_line, 0));
    step = int64_t(sizeof(T)) * depth * (along_k ? 1 : operand.leading);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int row = along_k ? min(line_of(i), operand.lines - 1 - first_line) : k_of(i);
      offset[i] = uint32_t((row * operand.leading + along) * int64_t(sizeof(T)));
    }
  }
  __device__ __forceinline__ int line_of(int i) const { return along_k ? line + i * rows_apart : line; }
  __device__ __forceinline__ int k_of(int i) const { return along_k ? k : k + i * rows_apart; }

  // Starts the copies of the next slice, each to the address to(line, k).
  template <class To>
  __device__ __forceinline__ void start(To to) {
    const int inside = max(0, min(width, along_k ? left - k : lines_left)) * int(sizeof(T));
#pragma unroll
    for (int i = 0; i < count; ++i)
      ptx::cp_async<width * sizeof(T)>(to(line_of(i), k_of(i)), corner + offset[i],
                                       along_k || k_of(i) < left ? inside : 0);
    corner += step;
    left -= depth;
  }
};

// Calls store(i, sum[i]) for each row of a thread's sums. Registers have no index, so an unrolled loop would hold the
// code of the epilogue once a row, and compile as long; here each row passes through the registers of the first.
template <int rows, int columns, class Store>
__device__ __forceinline__ void for_rows(float (&sum)[rows][columns], Store store) {
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    store(i, sum[0]);
#pragma unroll
    for (int row = 1; row < rows; ++row)
#pragma unroll
      for (int j = 0; j < columns; ++j) sum[row - 1][j] = sum[row][j];
  }
}

// A warp stores `rows` x `columns` sums that lie in shared memory, `pitch` apart: 16 bytes of d a lane, neighbours
// beside each other, where the registers of steps 07 and 08 would give short pieces of many rows. And the code of the
// epilogue exists once in the kernel, not once for every register.
template <int rows, int columns, int pitch, class In, class Out>
__device__ __forceinline__ void store_patch(const Epilogue<In, Out>& epilogue, const float* patch, int row,
                                            int column) {
  constexpr int run = 16 / sizeof(Out), across = columns / run;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < rows * across; i += 32) {
    const int y = i / across, x = i % across * run;
    float sum[run];
#pragma unroll
    for (int j = 0; j < run; ++j) sum[j] = patch[y * pitch + x + j];
    epilogue.store_run(blockIdx.z, row + y, column + x, sum);
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------
inline const char* name_of(DataType type) {
  return type == DataType::f32 ? "f32" : type == DataType::bf16 ? "bf16" : type == DataType::f16 ? "f16" : "another";
}

inline void require_f32(const Problem& p, const char* step) {
  if (p.in != DataType::f32 || p.out != DataType::f32)
    throw std::invalid_argument(std::string(step) + " multiplies f32 into f32; got " + name_of(p.in) + " into " +
                                name_of(p.out) + " (bf16 and f16 start at mma_sync_08)");
}

inline void require_16_bit(const Problem& p, const char* step) {
  const bool in = p.in == DataType::bf16 || p.in == DataType::f16, out = p.out == p.in || p.out == DataType::f32;
  if (!in || !out)
    throw std::invalid_argument(std::string(step) + " multiplies bf16 or f16 into f32 or the same type; got " +
                                name_of(p.in) + " into " + name_of(p.out));
}

inline void require_pairs_for_swiglu(const Problem& p, const char* step) {
  if (p.activation == Activation::swiglu && p.n % 2 != 0)
    throw std::invalid_argument(std::string(step) + ": swiglu pairs columns, so n must be even; got " +
                                std::to_string(p.n));
}

inline void refuse_swiglu(const Problem& p, const char* step) {
  if (p.activation == Activation::swiglu)
    throw std::invalid_argument(std::string(step) + " has no swiglu: its threads own single columns, and swiglu needs a"
                                " pair (steps 05 and up have it)");
}

// Calls start(a, b, epilogue, part) with the operands in the layout of the problem. The batch is blockIdx.z, which ends
// at 65535: a larger one is started in several parts.
template <class In, class Ending, class Start>
void for_layout(const Problem& problem, Start start) {
  constexpr int most = 65535, largest = 0x7fffffff - 1024;
  if (problem.m > largest || problem.n > largest || problem.k > largest)
    throw std::invalid_argument("sizes " + std::to_string(problem.m) + ", " + std::to_string(problem.n) + " and " +
                                std::to_string(problem.k) + ": expected at most 2^31 - 1025");
  const int64_t out_size = simt::size_of(problem.out);
  for (int first = 0; first < problem.batch; first += most) {
    Problem part = problem;
    part.batch = problem.batch - first < most ? problem.batch - first : most;
    part.a = static_cast<const In*>(problem.a) + first * problem.stride_a;
    part.b = static_cast<const In*>(problem.b) + first * problem.stride_b;
    part.d = static_cast<char*>(problem.d) + first * problem.stride_d * out_size;
    if (problem.c) part.c = static_cast<const char*>(problem.c) + first * problem.stride_c * out_size;

    const auto with_operands = [&](auto a_along_k, auto b_along_k) {
      start(Operand<In, a_along_k>::of(part.a, part.lda, part.stride_a, part.m, part.k),
            Operand<In, b_along_k>::of(part.b, part.ldb, part.stride_b, part.n, part.k), Ending::of(part), part);
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (part.transpose_a) part.transpose_b ? with_operands(no, yes) : with_operands(no, no);
    else part.transpose_b ? with_operands(yes, yes) : with_operands(yes, no);
  }
}

// A grid of one block a tile, for tile_of_block.
inline simt::Launch grid_of_tiles(const Problem& part, int tile_m, int tile_n, dim3 block, size_t shared_bytes = 0) {
  simt::Launch launch{dim3(ceil_div(part.m, tile_m) * ceil_div(part.n, tile_n), 1, part.batch), block, shared_bytes};
  launch.stream = part.stream;
  return launch;
}

// True if square tiles of this side give every multiprocessor one. If not, half the side gives four times as many.
inline bool enough_tiles(const Problem& part, int tile) {
  return int64_t(ceil_div(part.m, tile)) * ceil_div(part.n, tile) * part.batch >= simt::multiprocessors();
}

}  // namespace matmul
