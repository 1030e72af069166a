// Matrix descriptors of wgmma: where the 16-byte chunks of an operand lie in shared memory, for K-major and MN-major
// tiles in every swizzle mode (PTX ISA 9.0, "Canonical Layouts" of wgmma), and the operand as rows of floats. Refuses
// descriptors with a base offset, and operands that leave the block's shared memory.
#include <algorithm>
#include <cstring>

#include "state.h"
#include "tensor_core.h"

namespace simt::model {

namespace {

// A swizzle atom is 8 rows of `width` chunks; without swizzle it is 8 chunks. W = 8 below would be 128-byte swizzle:
//   K-major, none    row r, chunk h:  (r % 8) 16 + (r / 8) stride + h leading
//   K-major, W       row r, chunk h:  (r % 8) 16 W + (r / 8) stride + 16 h
//   MN-major, none   chunk g, k:      g stride + (k % 8) 16 + (k / 8) leading
//   MN-major, W      chunk g, k:      (g % W) 16 + (g / W) leading + (k % 8) 16 W + (k / 8) stride
uint32_t linear_address(const MatrixOperand& m, uint32_t chunk, uint32_t other) {  // other: row r, or k
  const bool plain = m.swizzle == Swizzle::none;
  const uint32_t width = 1u << int(m.swizzle), eights = other / 8 * (plain && m.mn_major ? m.leading : m.stride);
  const uint32_t within = other % 8 * 16 * width + eights;
  if (m.mn_major) return m.start + within + (plain ? chunk * m.stride : chunk % width * 16 + chunk / width * m.leading);
  return m.start + within + chunk * (plain ? m.leading : 16);
}

uint32_t offset_of(const MatrixOperand& m, uint32_t chunk, uint32_t other) {  // in the block's shared memory
  return swizzled(linear_address(m, chunk, other), m.swizzle) - shared_window;
}

template <class Visit>
void each_chunk(const MatrixOperand& m, Visit visit) {
  const uint32_t chunks = m.mn_major ? uint32_t(m.extent) / 8 : 2, others = m.mn_major ? 16 : uint32_t(m.extent);
  for (uint32_t chunk = 0; chunk < chunks; ++chunk)
    for (uint32_t other = 0; other < others; ++other) visit(offset_of(m, chunk, other), chunk, other);
}

Swizzle mode_of(uint64_t descriptor) {
  constexpr Swizzle modes[] = {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32};
  return modes[descriptor >> 62];
}

}  // namespace

MatrixOperand matrix_operand(uint64_t descriptor, bool mn_major, int extent, const char* name, const Cta& block,
                             Site site) {
  const std::string what = std::string("wgmma: the descriptor of operand ") + name;
  if (descriptor >> 49 & 7)
    fail(what + " has base offset " + std::to_string(descriptor >> 49 & 7) + ", which is not modelled: align the tile",
         site);
  MatrixOperand m;
  m.start = uint32_t(descriptor & 0x3fff) << 4;
  m.leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  m.stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  m.swizzle = mode_of(descriptor);
  m.mn_major = mn_major;
  m.extent = extent;
  if (m.start < shared_window)
    fail(what + " starts at address " + std::to_string(m.start) + ", before shared memory", site);
  m.low = ~0u;
  each_chunk(m, [&](uint32_t offset, uint32_t, uint32_t) {
    m.low = std::min(m.low, offset);
    m.high = std::max(m.high, offset + 16);
  });
  if (m.high > block.shared_bytes)
    fail(what + ": the tile at " + shared_name(m.start - shared_window) + " (leading " + std::to_string(m.leading) +
             ", stride " + std::to_string(m.stride) + " bytes) reaches " + shared_name(m.high) + ", past the block's " +
             std::to_string(block.shared_bytes) + " bytes of shared memory",
         site);
  return m;
}

bool touches(const MatrixOperand& operand, uint32_t low, uint32_t high) {
  if (!operand.extent || !overlap(operand.low, operand.high, low, high)) return false;
  bool found = false;
  each_chunk(operand, [&](uint32_t offset, uint32_t, uint32_t) { found |= overlap(offset, offset + 16, low, high); });
  return found;
}

std::vector<std::pair<uint32_t, uint32_t>> ranges(const MatrixOperand& operand, int first, int rows) {
  std::vector<uint32_t> offsets;
  each_chunk(operand, [&](uint32_t offset, uint32_t chunk, uint32_t other) {
    const int row = int(operand.mn_major ? chunk * 8 : other);
    if (row >= first && row < first + rows) offsets.push_back(offset);
  });
  std::sort(offsets.begin(), offsets.end());
  std::vector<std::pair<uint32_t, uint32_t>> merged;
  for (const uint32_t offset : offsets) {
    if (!merged.empty() && merged.back().second >= offset)
      merged.back().second = offset + 16;
    else
      merged.push_back({offset, offset + 16});
  }
  return merged;
}

void read_operand(const MatrixOperand& m, const Cta& block, DataType type, float* tile) {
  const char* memory = block.shared_async;
  if (m.mn_major) {
    each_chunk(m, [&](uint32_t offset, uint32_t chunk, uint32_t k) {
      Eight<uint16_t> bits;
      memcpy(&bits, memory + offset, 16);
      to_floats(bits, type, tile + k * tile_pitch + chunk * 8);
    });
    return;
  }
  for (uint32_t row = 0; row < uint32_t(m.extent); row += 8)
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      Eight<uint16_t> bits[8];
      for (uint32_t i = 0; i < 8; ++i) memcpy(&bits[i], memory + offset_of(m, chunk, row + i), 16);
      transpose(bits);
      for (uint32_t i = 0; i < 8; ++i) to_floats(bits[i], type, tile + (chunk * 8 + i) * tile_pitch + row);
    }
}

}  // namespace simt::model
