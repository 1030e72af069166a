// wgmma: the threads of a warpgroup only record the instruction; when all 128 have, and the time has come (async.cpp),
// it is executed for all. Operands in shared memory are read then, from the async view; A from registers at issue.
// Refuses warpgroups whose threads disagree, a first wgmma without the wgmma.fence (the checked build: any whose registers
// were touched since), operands that are not there yet.
#include <algorithm>
#include <cstring>
#include <memory>

#include "state.h"
#include "tensor_core.h"
#include "trace.h"

namespace simt::model {

namespace {

constexpr unsigned group_threads = 128;

unsigned group_of(const Thread& thread) { return thread.linear / group_threads; }

bool same(const Wgmma& x, const Wgmma& y) {
  return x.n == y.n && x.type == y.type && x.b == y.b && !x.a_registers == !y.a_registers &&
         (x.a_registers || x.a == y.a) && x.a_mn_major == y.a_mn_major && x.b_mn_major == y.b_mn_major &&
         x.scale_d == y.scale_d;
}

std::string still_loading(const char* name, const MatrixOperand& m, const CopyOperation& load) {
  return std::string("wgmma reads operand ") + name + " at " + shared_name(m.start - shared_window) + " while the " +
         copy_name(load) + " issued at " + at(load.site) + " into " + shared_name(load.offset) +
         " is still in flight (its mbarrier was not waited for)";
}

const CopyOperation* loading(const MatrixOperand& m, const Cta& block) {
  if (!m.extent || block.gang->async.copies.empty()) return nullptr;
  if (!load_in_flight(block, m.low, m.high)) return nullptr;
  for (const auto& [low, high] : ranges(m, 0, m.extent))
    if (const CopyOperation* load = load_in_flight(block, low, high)) return load;
  return nullptr;
}

void check_layout(const char* name, const MatrixOperand& m, const WgmmaOperation& op, const Cta& block) {
  for (const WrittenByTma& written : block.async.layout)
    if (written.swizzle != m.swizzle && touches(m, written.offset, written.offset + written.bytes))
      fail_issued(std::string("wgmma: the descriptor of operand ") + name + " says " + swizzle_name(m.swizzle) +
                      ", but the TMA load issued at " + at(written.site) + " wrote " + shared_name(written.offset) +
                      " with " + swizzle_name(written.swizzle),
                  op.site, block);
}

// The operand's tile of floats, once it is sure that it may be read.
void fetch(const char* name, const MatrixOperand& m, WgmmaOperation& op, Cta& block, float* tile) {
  if (const CopyOperation* load = loading(m, block)) fail_issued(still_loading(name, m, *load), op.site, block);
  check_layout(name, m, op, block);
#if defined(SIMT_CHECKED)  // each warp multiplies its 16 rows of A by all of B, when it is ready
  const auto read_by = [&](check::Snapshot by, int first, int rows) {
    for (const auto& [low, high] : ranges(m, first, rows))
      check::async_access(by, block.shared + low, high - low, false, &block, op.site);
  };
  if (&m == &op.b) read_by(check::of_each_warp(op.snapshot), 0, m.extent);
  else
    for (int warp = 0; warp < 4; ++warp) read_by(check::of_warp(op.snapshot, unsigned(warp)), 16 * warp, 16);
#endif
  read_operand(m, block, op.operands.type, tile);
}

// A from registers: a[i] holds row 16 (t / 32) + (t % 32) / 4 + 8 (i % 2), columns 8 (i / 2) + 2 (t % 4) and the next.
void fetch_registers(const WgmmaOperation& op, float* tile) {
  const auto value = op.operands.type == DataType::bf16 ? bf16_value : f16_value;
  for (unsigned t = 0; t < group_threads; ++t)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = 16 * (t / 32) + t % 32 / 4 + 8 * (i % 2), k = 8 * (i / 2) + 2 * (t % 4);
      tile[k * tile_pitch + row] = value(uint16_t(op.a_registers[t][i]));
      tile[(k + 1) * tile_pitch + row] = value(uint16_t(op.a_registers[t][i] >> 16));
    }
}

// d[i] of thread t is row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2: pairs.
template <class Move>
void each_pair(float* const* d, int n, float* c, Move move) {
  for (unsigned t = 0; t < group_threads; ++t) {
    float* row = c + (16 * (t / 32) + t % 32 / 4) * tile_pitch + 2 * (t % 4);
    for (int i = 0; i < n / 2; i += 4) {
      move(d[t] + i, row + 2 * i);
      move(d[t] + i + 2, row + 8 * tile_pitch + 2 * i);
    }
  }
}

struct Tiles {
  alignas(64) float a[16 * tile_pitch], b[16 * tile_pitch], c[64 * tile_pitch];
};

void compute(WgmmaOperation& op, Cta& block, Tiles& tiles) {
  const Wgmma& w = op.operands;
  if (op.a.extent)
    fetch("A", op.a, op, block, tiles.a);
  else
    fetch_registers(op, tiles.a);
  fetch("B", op.b, op, block, tiles.b);
  if (!w.scale_d)
    for (int row = 0; row < 64; ++row) memset(tiles.c + row * tile_pitch, 0, size_t(w.n) * sizeof(float));
  multiply_accumulate(tiles.c, tiles.a, tiles.b, 64, w.n);
}

void check_operands(const Wgmma& w, const Thread& thread, Site site) {
  if (w.n < 8 || w.n > 256 || w.n % 8)
    fail("wgmma with N = " + std::to_string(w.n) + ", expected 8, 16, .., 256", site);
  if (w.type != DataType::bf16 && w.type != DataType::f16)
    fail("wgmma of elements other than bf16 and f16 is not modelled", site);
  const unsigned first = group_of(thread) * group_threads, threads = std::min(group_threads, thread.cta->count - first);
  if (threads < group_threads)
    fail("wgmma by warpgroup " + std::to_string(group_of(thread)) + ", which has only " + std::to_string(threads) +
             " of 128 threads",
         site);
  if (!thread.async.wgmma_fenced)
    fail("wgmma without a wgmma.fence before the first", site);
}

// The first thread of the warpgroup to reach an instruction decodes it for all.
WgmmaOperation& record(Warpgroup& group, const Wgmma& w, Cta& block, Site site) {
  WgmmaOperation& op = group.operations.emplace_back();
  op.operands = w;
  op.site = site;
  if (!w.a_registers) op.a = matrix_operand(w.a, w.a_mn_major, 64, "A", block, site);
  op.b = matrix_operand(w.b, w.b_mn_major, w.n, "B", block, site);
  if (const CopyOperation* load = loading(op.a, block)) fail(still_loading("A", op.a, *load), site);
  if (const CopyOperation* load = loading(op.b, block)) fail(still_loading("B", op.b, *load), site);
  return op;
}

}  // namespace

bool wgmma_ready(const Warpgroup& group) {
  return group.wanted > group.done && group.wanted - group.first <= group.operations.size() &&
         group.operations[group.wanted - 1 - group.first].issued == int(group_threads);
}

// Instructions that follow each other on the same accumulators keep them dense in between.
void wgmma_execute(Cta& block, Warpgroup& group, uint64_t target) {
  static thread_local const auto kept = std::make_unique<Tiles>();
  Tiles& tiles = *kept;
  float* const* held = nullptr;
  int held_n = 0;
  const auto scatter = [&] {
    if (held) each_pair(held, held_n, tiles.c, [](float* registers, float* dense) { memcpy(registers, dense, 8); });
  };
  for (; group.done < target; ++group.done) {
    WgmmaOperation& op = group.operations[group.done - group.first];
    if (!held || held_n != op.operands.n || memcmp(held, op.d, sizeof op.d)) {
      scatter();
      held = op.d;
      held_n = op.operands.n;
      if (op.operands.scale_d)
        each_pair(held, held_n, tiles.c, [](float* registers, float* dense) { memcpy(dense, registers, 8); });
    }
    compute(op, block, tiles);
  }
  scatter();
  progressed();
  const unsigned first = unsigned(&group - block.async.warpgroups.data()) * group_threads;
  for (unsigned i = first; i < std::min(block.count, first + group_threads); ++i) {
    Thread& thread = block.threads[i];
    if (thread.state == State::waiting && thread.waits == Waits::wgmma && thread.detail <= group.done) wake(&thread);
  }
}

void wgmma(float* d, const Wgmma& operands, Site site) {
  Inside inside;
  Thread& thread = *self();
  Cta& block = *thread.cta;
  aligned(site);
  check_operands(operands, thread, site);
  Warpgroup& group = block.async.warpgroups[group_of(thread)];
  const uint64_t number = thread.async.wgmma_issued++;
  trace("wgmma", operands.n, operands.a_registers != nullptr, site);
  const bool first = number - group.first == group.operations.size();
  WgmmaOperation& op = first ? record(group, operands, block, site) : group.operations[number - group.first];
  if (!same(op.operands, operands))
    fail("wgmma: the threads of the warpgroup disagree on the operands; the others are at " + at(op.site), site);
  const unsigned t = thread.linear % group_threads;
  check::registers_fenced(thread, d, size_t(operands.n) / 2 * sizeof(float), site);
  if (operands.a_registers) check::registers_fenced(thread, operands.a_registers, 16, site);
  op.d[t] = d;
  if (!operands.scale_d) memset(d, 0xff, size_t(operands.n) / 2 * sizeof(float));  // NaN before the wait
  op.a_place[t] = operands.a_registers;
  if (operands.a_registers) memcpy(op.a_registers[t], operands.a_registers, sizeof op.a_registers[t]);
  check::issue(op.snapshot, thread, check::Agent::wgmma);
  check::in_flight(thread, d, size_t(operands.n) / 2 * sizeof(float), true, site);
  if (operands.a_registers) check::in_flight(thread, operands.a_registers, 16, false, site);
  if (++op.issued < int(group_threads)) return;
  check::count(check::Count::wgmma, 1, op.site);
  if (happens_at_once()) wgmma_execute(block, group, number + 1);
}

void wgmma_fence(Site site) {
  Inside inside;
  aligned(site);
  self()->async.wgmma_fenced = true;
  check::fence_registers(*self());
}

void wgmma_commit_group(Site site) {
  Inside inside;
  aligned(site);
  ThreadAsync& mine = self()->async;
  mine.wgmma_groups.push_back(mine.wgmma_issued);
  trace("wgmma commit", 0, 0, site);
}

void wgmma_wait_group(int pending, Site site) {
  Inside inside;
  aligned(site);
  Thread& thread = *self();
  ThreadAsync& mine = thread.async;
  trace("wgmma wait", 0, pending, site);
  if (int(mine.wgmma_groups.size()) <= pending) return;
  const uint64_t target = mine.wgmma_groups[mine.wgmma_groups.size() - 1 - size_t(pending)];
  mine.wgmma_groups.erase(mine.wgmma_groups.begin(), mine.wgmma_groups.end() - pending);
  Warpgroup& group = thread.cta->async.warpgroups[group_of(thread)];
  if (target > group.done) {
    group.wanted = std::max(group.wanted, target);
    block_on(Waits::wgmma, &group, target, site);
  }
  check::landed(thread);
  for (; mine.wgmma_waited < target; ++mine.wgmma_waited) {
    WgmmaOperation& op = group.operations[mine.wgmma_waited - group.first];
    check::acquire(op.snapshot, thread);
    ++op.waited;
  }
  const unsigned t = thread.linear % group_threads;
  for (uint64_t i = target; i < mine.wgmma_issued; ++i) {  // of these the registers are still in flight
    WgmmaOperation& op = group.operations[i - group.first];
    check::in_flight(thread, op.d[t], size_t(op.operands.n) / 2 * sizeof(float), true, op.site);
    if (op.a_place[t]) check::in_flight(thread, op.a_place[t], 16, false, op.site);
  }
  for (; !group.operations.empty() && group.operations.front().waited == int(group_threads); ++group.first)
    group.operations.pop_front();
}

std::string wgmma_wait_text(const Thread& thread) {
  const Warpgroup& group = thread.cta->async.warpgroups[group_of(thread)];
  std::string text = "wgmma.wait_group";
  for (uint64_t i = group.done; i < thread.detail && i - group.first < group.operations.size(); ++i) {
    const WgmmaOperation& op = group.operations[i - group.first];
    if (op.issued < int(group_threads))
      return text + " (the wgmma at " + at(op.site) + " was reached by " + std::to_string(op.issued) +
             " of 128 threads)";
  }
  return text;
}

}  // namespace simt::model
