// Tiles of the products of lora_sgmv: 16 or 64 rows by 64 columns a block, 16 x 64 or 16 x 16 for each of its 4 warps.
//
// An operand's tile lies in shared memory as it does in global memory, in lines of 128 bytes or more, copied by 16
// bytes where that is possible; an XOR with the line's number permutes its 16-byte chunks, so that ldmatrix finds any
// eight neighbouring lines in different banks. 16-bit types go through mma.sync, 16 x 8 x 16; float32 through FMA,
// where a thread has 4 rows and every 8th column.
#pragma once
#include "fused/lora.cuh"

namespace fused {
namespace lora {

constexpr int tile_threads = 128, tile_columns = 64;
template <class T>
constexpr int slice = 128 / int(sizeof(T));  // of the sum, for each stage of a ring

// Where an element of a tile lies whose lines have `width` elements.
template <class T, int width>
PTX_INLINE int place(int line, int column) {
  constexpr int n = per_chunk<T>;
  return line * width + (column / n ^ line % 8) * n + column % n;
}

// Starts to copy `lines` x `width` elements from `from` on, `lines_left` and `left` of which exist; the others become
// zeros. Neighbouring threads have neighbouring chunks.
template <int lines, int width, class T>
PTX_INLINE void copy_tile(T* to, const T* from, int64_t line_step, int64_t step, int lines_left, int left, bool wide) {
  constexpr int n = per_chunk<T>, across = width / n;
#pragma unroll
  for (int done = 0; done < lines * across; done += tile_threads) {
    const int i = done + threadIdx.x, line = i / across, column = i % across * n;
    if (lines * across % tile_threads && i >= lines * across) break;
    const int many = line < lines_left ? max(0, min(n, left - column)) : 0;
    const T* const source = many ? from + line * line_step + column * step : from;
    T* const target = to + place<T, width>(line, column);
    if (wide) {
      ptx::cp_async(target, source, many * int(sizeof(T)));
    } else {
#pragma unroll 1
      for (int j = 0; j < n; ++j) target[j] = j < many ? source[j * step] : T(0.f);
    }
  }
}

// The tile of weights of a stage: 64 columns x slice, each column's numbers side by side (`along`), or each slice's.
template <class T, bool along>
PTX_INLINE void copy_weights(T* to, const T* from, int64_t column_step, int64_t step, int columns_left, int left,
                             bool wide) {
  if constexpr (along) copy_tile<tile_columns, slice<T>>(to, from, column_step, step, columns_left, left, wide);
  else copy_tile<slice<T>, tile_columns>(to, from, step, column_step, left, columns_left, wide);
}

// Which part of the block's tile a warp has. `groups` of 16 columns.
template <int rows>
struct WarpTile {
  static constexpr int groups = rows == 64 ? 4 : 1, columns = 16 * groups, pitch = columns + 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = rows == 64 ? 16 * warp : 0, column = rows == 64 ? 0 : 16 * warp;
};

// The sums of a warp: sum[g][i] is of group g; which element of it says `element`.
template <int rows>
struct Sums {
  float of[WarpTile<rows>::groups][8];
  PTX_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < WarpTile<rows>::groups * 8; ++i) of[i / 8][i % 8] = 0.f;
  }
};
// The row and the column of sums i and i + 1 of a group, i even: neighbours in 16 bits, 8 columns apart in float32.
template <class T>
PTX_INLINE int row_of(int i) {
  const int lane = threadIdx.x % 32;
  return sizeof(T) == 2 ? lane / 4 + i / 2 % 2 * 8 : lane / 8 + i / 2 * 4;
}
template <class T>
PTX_INLINE int column_of(int i) {
  const int lane = threadIdx.x % 32;
  return sizeof(T) == 2 ? i / 4 * 8 + lane % 4 * 2 : lane % 8;
}

// A tile of rows in shared memory whose lines, of `width` elements, lie along the sum, or, `across`, along the rows.
template <class T, int width, bool across>
PTX_INLINE void load_rows(uint32_t (&a)[4], const T* from, int row, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (across)
    ptx::ldmatrix_x4<true>(a, from + place<T, width>(k + lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
  else ptx::ldmatrix_x4(a, from + place<T, width>(row + lane % 16, k + lane / 16 * 8));
}
template <class T, bool along>
PTX_INLINE void load_columns(uint32_t (&b)[4], const T* from, int column, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (along)
    ptx::ldmatrix_x4(b, from + place<T, slice<T>>(column + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
  else ptx::ldmatrix_x4<true>(b, from + place<T, tile_columns>(k + lane % 16, column + lane / 16 * 8));
}

// sum += left right, of the first `depth` numbers of a slice and the first `columns` columns of the tile. `left` begins
// at column left_k of its lines; where it has been split in two (`parts`), its second part lies `apart` elements on.
template <int rows, int left_width, bool across, bool along, int parts, class T>
PTX_INLINE void multiply(Sums<rows>& sum, const T* left, int left_k, int apart, const T* right, int depth,
                         int columns) {
  using Tile = WarpTile<rows>;
  const Tile mine;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < slice<T>; k += 16) {
      if (k >= depth) break;
      uint32_t a[parts][4];
#pragma unroll
      for (int p = 0; p < parts; ++p) load_rows<T, left_width, across>(a[p], left + p * apart, mine.row, left_k + k);
#pragma unroll
      for (int g = 0; g < Tile::groups; ++g) {
        if (mine.column + 16 * g >= columns) break;
        uint32_t b[4];
        load_columns<T, along>(b, right, mine.column + 16 * g, k);
#pragma unroll
        for (int p = parts - 1; p >= 0; --p)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sum.of[g][4 * half]);
            const uint32_t pair[2] = {b[2 * half], b[2 * half + 1]};
            ptx::mma_m16n8k16<T>(d, a[p], pair, d);
          }
      }
    }
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int k = 0; k < slice<T>; ++k) {
      if (k >= depth) break;
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = mine.row + lane / 8 + 4 * i;
        a[i] = left[across ? place<T, left_width>(left_k + k, row) : place<T, left_width>(row, left_k + k)];
      }
#pragma unroll
      for (int g = 0; g < Tile::groups; ++g)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = mine.column + 16 * g + lane % 8 + 8 * c;
          const float b = right[along ? place<T, slice<T>>(column, k) : place<T, tile_columns>(k, column)];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.of[g][2 * i + c] += a[i] * b;
        }
    }
  }
}

// The sums of a warp, row by row, in its part of shared memory.
template <class T, int rows>
PTX_INLINE void keep(const Sums<rows>& sum, float* patch) {
  constexpr int pitch = WarpTile<rows>::pitch;
#pragma unroll
  for (int g = 0; g < WarpTile<rows>::groups; ++g)
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float* const to = patch + row_of<T>(i) * pitch + 16 * g + column_of<T>(i);
      if constexpr (sizeof(T) == 2) *reinterpret_cast<float2*>(to) = make_float2(sum.of[g][i], sum.of[g][i + 1]);
      else to[0] = sum.of[g][i], to[8] = sum.of[g][i + 1];
    }
}

// ---- segments -------------------------------------------------------------------------------------------------------

struct Segments {
  const int32_t* starts;
  int count;

  // The first of the tiles kept for a segment. One with n rows needs ceil(n / rows) of them at most, and has as many
  // until the next one's first: so a block finds its tile by a search, and nobody counts.
  template <int rows>
  PTX_INLINE int first_tile(int segment) const {
    return starts[segment] / rows + segment;
  }
};

struct RowTile {
  int segment, first, rows;  // rows: 0 where the segment has ended

  // By the whole warp, 32 places of the list at a time.
  template <int most>
  PTX_INLINE static RowTile find(const Segments& s, int tile) {
    const int lane = threadIdx.x % 32;
    int begin = 0, end = s.count;  // it is in there
#pragma unroll 1
    while (end - begin > 1) {
      const int step = (end - begin + 31) / 32, at = begin + lane * step;
      const unsigned not_past = __ballot_sync(0xffffffff, at < end && s.first_tile<most>(at) <= tile);
      begin += (__popc(not_past) - 1) * step;
      end = min(begin + step, end);
    }
    const int first = s.starts[begin] + (tile - s.first_tile<most>(begin)) * most;
    return {begin, first, min(most, max(0, s.starts[begin + 1] - first))};
  }
};

// x A^T of some rows, `width` ranks of it: the parts added up, and split in two for tensor cores, the second number
// lines * line_width elements after the first. Zeros past the rank and the rows.
template <class T, int lines, int line_width>
PTX_INLINE void load_between(T* to, const Between& between, int first, int rows, int rank, int width) {
  const int across = width / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < lines * across; i += tile_threads) {
    const int row = i / across, r = i % across * 4;
    float x[4] = {};
    if (row < rows && r < rank) {
#pragma unroll 1
      for (int part = 0; part < between.parts; ++part) {
        const float4 more = *reinterpret_cast<const float4*>(between.at(part, first + row, r));
        x[0] += more.x, x[1] += more.y, x[2] += more.z, x[3] += more.w;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T* const at = to + place<T, line_width>(row, r + j);
      const T high = T(x[j]);
      at[0] = high;
      if constexpr (sizeof(T) == 2) {
        const float rest = x[j] - float(high);
        at[lines * line_width] = T(fabsf(rest) < INFINITY ? rest : 0.f);  // infinity minus itself
      }
    }
  }
}

// grad (adapters, most, width) = scale * (x A^T)^T x over the rows of each adapter: lora_outer.cu.
void run_outer(const View& x, const Between& between, const Segments& segments, const Adapters& adapters,
               const View& grad, void* stream);

}  // namespace lora
}  // namespace fused
