// ldmatrix, stmatrix and mma.sync.m16n8k16: each lane leaves its operands, the last to come does the work of all 32.
// ldmatrix and stmatrix move what the threads see of shared memory, not what TMA and wgmma see.
#include <cstring>

#include "state.h"
#include "tensor_core.h"

namespace simt::model {

namespace {

constexpr unsigned all_lanes = ~0u;

struct Rows {  // ldmatrix and stmatrix: lane 8q + i names row i of matrix q
  char* row;
  uint32_t* registers;
  int matrices;
  bool transpose;
  Site site;
};

struct Fragments {
  float* d;
  const uint32_t *a, *b;
  const float* c;
  DataType type;
  Site site;
};

// The row of this lane, if its lane names one.
void check_row(const char* what, const void* row, int matrices, bool write, Site site) {
  Thread& thread = *self();
  const unsigned lane = thread.linear % 32;
  if (lane >= unsigned(8 * matrices)) return;
  const std::string whose = std::string(what) + ": the row of lane " + std::to_string(lane) + ", " + where(row) + ", ";
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(whose + "is not 16-byte aligned", site);
  if (!is_shared(row, 16)) fail(whose + "is not in shared memory, or runs past its end", site);
  check::touch(row, 16, write, thread, site);
}

void check_warp(unsigned mask, Site site) {
  if (mask != all_lanes) fail("a matrix instruction by a warp of fewer than 32 threads", site);
}

// visit(row of a matrix, column, lane and register and half that hold it)
template <class Visit>
void each_element(void** payloads, unsigned mask, Visit visit) {
  auto& first = *static_cast<Rows*>(payloads[0]);
  check_warp(mask, first.site);
  for (unsigned lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<Rows*>(payloads[lane]);
    if (mine.matrices != first.matrices || mine.transpose != first.transpose)
      fail("the lanes of a warp disagree on the matrix instruction; others are at " + at(first.site), mine.site);
    for (int q = 0; q < first.matrices; ++q)
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned i = lane / 4, j = 2 * (lane % 4) + half;
        auto& named = *static_cast<Rows*>(payloads[8 * unsigned(q) + (mine.transpose ? j : i)]);
        visit(named.row + 2 * (mine.transpose ? i : j), mine.registers[q], half);
      }
  }
}

void load_rows(void** payloads, unsigned mask) {
  each_element(payloads, mask, [](const char* element, uint32_t& pair, unsigned half) {
    uint16_t value;
    memcpy(&value, element, 2);
    pair = half ? (pair & 0xffffu) | uint32_t(value) << 16 : value;
  });
}

void store_rows(void** payloads, unsigned mask) {
  each_element(payloads, mask, [](char* element, const uint32_t& pair, unsigned half) {
    const uint16_t value = uint16_t(half ? pair >> 16 : pair);
    memcpy(element, &value, 2);
  });
}

// With g = lane / 4 and t = lane % 4: a[i] holds row g + 8 (i & 1), columns 2t + 8 (i >> 1) and the next; b[i] rows
// 2t + 8i and the next, column g; c[i] and d[i] row g + 8 (i >> 1), column 2t + (i & 1).
void multiply(void** payloads, unsigned mask) {
  static thread_local struct {
    alignas(64) float a[16 * tile_pitch], b[16 * tile_pitch], c[16 * tile_pitch];
  } tiles;
  auto& first = *static_cast<Fragments*>(payloads[0]);
  check_warp(mask, first.site);
  const auto value = first.type == DataType::bf16 ? bf16_value : f16_value;
  const auto pair = [&](float* low, float* high, uint32_t bits) {
    *low = value(uint16_t(bits));
    *high = value(uint16_t(bits >> 16));
  };
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Fragments*>(payloads[lane]);
    if (mine.type != first.type)
      fail("the lanes of a warp disagree on the type of mma; others are at " + at(first.site), mine.site);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      float* a = tiles.a + (2 * t + 8 * (i >> 1)) * tile_pitch + g + 8 * (i & 1);
      pair(a, a + tile_pitch, mine.a[i]);
      tiles.c[(g + 8 * (i >> 1)) * tile_pitch + 2 * t + (i & 1)] = mine.c[i];
    }
    for (unsigned i = 0; i < 2; ++i) {
      float* b = tiles.b + (2 * t + 8 * i) * tile_pitch + g;
      pair(b, b + tile_pitch, mine.b[i]);
    }
  }
  multiply_accumulate(tiles.c, tiles.a, tiles.b, 16, 8);
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      static_cast<Fragments*>(payloads[lane])->d[i] =
          tiles.c[(lane / 4 + 8 * (i >> 1)) * tile_pitch + 2 * (lane % 4) + (i & 1)];
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transpose, const void* row, Site site) {
  Inside inside;
  check_row("ldmatrix", row, matrices, false, site);
  Rows mine{static_cast<char*>(const_cast<void*>(row)), registers, matrices, transpose, site};
  warp_collective(all_lanes, WarpOp::ldmatrix, &mine, load_rows, site);
  check::touch_registers(*self(), registers, size_t(matrices) * 4, site);
}

void stmatrix(void* row, int matrices, bool transpose, const uint32_t* registers, Site site) {
  Inside inside;
  check_row("stmatrix", row, matrices, true, site);
  Rows mine{static_cast<char*>(row), const_cast<uint32_t*>(registers), matrices, transpose, site};
  warp_collective(all_lanes, WarpOp::stmatrix, &mine, store_rows, site);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, DataType type, Site site) {
  Inside inside;
  if (type != DataType::bf16 && type != DataType::f16)
    fail("mma of elements other than bf16 and f16 is not modelled", site);
  if (self()->linear % 32 == 0) check::count(check::Count::mma, 1, site);
  Fragments mine{d, a, b, c, type, site};
  warp_collective(all_lanes, WarpOp::mma, &mine, multiply, site);
}

}  // namespace simt::model
