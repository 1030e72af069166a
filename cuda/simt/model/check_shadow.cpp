// The check of one access against what the shadow memory remembers.
#if defined(SIMT_CHECKED)
#include "check_shadow.h"

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

namespace simt::model::check {

namespace {

std::vector<std::vector<Cell>> shared_cells;  // by block of the gang
std::vector<Cell> static_cells;
constexpr uintptr_t page_bytes = 4096;
struct Page {
  Cell cells[page_bytes / 8];
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct {
  uintptr_t number;
  Page* page;
} recent_pages[256];
uint32_t global_epoch = 1;
uint32_t random_state = 12345;

unsigned random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

// Is the kept access in the accessor's past?
bool is_before(const Slot& slot, const Access& access) {
  // A read, or an atomic, has nothing that must become visible: it only has to be over.
  const bool passed = !(slot.flags & slot_write) || slot.flags & slot_strong;
  if (slot.gang != clocks.gang) return knows_foreign(access.clock->foreign, slot.gang, slot.who, slot.tick, passed);
  return slot.tick <= (passed ? access.clock->knows_passed(slot.who) : access.clock->knows(slot.who)) ||
         (slot.who == access.who && slot.tick == access.tick);
}

// Reductions are no race in any order. But where one block has its turn after another, both may not be at work.
bool turns_overlap(const Access& access, const Slot& slot) {
  const ReductionId mine{clocks.gang, access.who, access.tick}, other{slot.gang, slot.who, slot.tick};
  return turn_was_passed(other, mine) || turn_was_passed(mine, other);
}

int victim(const Cell& cell) {
  const unsigned first = random_number() % slots_of_cell;
  for (unsigned i = 0; i < slots_of_cell; ++i) {
    const unsigned slot = (first + i) % slots_of_cell;
    if (!(cell.slots[slot].flags & slot_write)) return int(slot);
  }
  return int(first);
}

void check_cell(Cell& cell, uint32_t epoch, uint8_t mask, const Access& access, const char* at, bool in_shared,
                const Cta* block, size_t offset) {
  if (cell.epoch != epoch) {
    cell.epoch = epoch;
    cell.count = cell.written = 0;
  }
  if (in_shared && access.reads() && (cell.written & mask) != mask)
    report_unwritten(access, at, block, offset);
  const uint8_t flags = uint8_t((access.write ? slot_write : 0) | (access.async ? slot_async : 0) |
                                (access.strong() ? slot_strong : 0));
  for (int i = 0; i < cell.count; ++i) {
    const Slot& slot = cell.slots[i];
    if (slot.who == access.who && slot.tick == access.tick && slot.gang == clocks.gang &&
        (slot.mask & mask) == mask && (slot.flags == flags || (slot.flags == (flags | slot_write))))
      return;  // nothing can have changed since
  }
  for (int i = 0; i < cell.count; ++i) {
    Slot& slot = cell.slots[i];
    if (!(slot.mask & mask)) continue;
    const bool other_writes = slot.flags & slot_write;
    const bool covered = (slot.mask & ~mask) == 0 && (access.write || !other_writes);
    const bool conflict = (access.write || other_writes) && !(access.strong() && slot.flags & slot_strong);
    const bool unfenced = in_shared && access.async && other_writes && !(slot.flags & slot_async);
    const bool both_reduce = access.reduces() && slot.flags & slot_async && slot.flags & slot_strong;
    if (!covered && !conflict && !unfenced && !both_reduce) continue;
    const bool before = is_before(slot, access);
    if (both_reduce && !before && turns_overlap(access, slot)) report_turn(access, at, slot);
    if (conflict && !before) report_race(access, at, slot, in_shared);
    if (unfenced && slot.tick > access.clock->knows_fenced(slot.who)) report_proxy(access, at, slot);
    if (covered && before) {
      cell.slots[i] = cell.slots[--cell.count];
      --i;
    }
  }
  const int place = cell.count < slots_of_cell ? cell.count++ : victim(cell);
  cell.slots[place] = {clocks.gang, access.tick, access.who, clocks.time, access.place, mask, flags};
  if (access.write) cell.written |= mask;
}

// Calls `visit(index of the cell, mask, first byte)` for each 8 bytes that the access touches.
template <class Visit>
void for_cells(uintptr_t start, size_t bytes, const char* pointer, Visit visit) {
  for (uintptr_t at = start; at < start + bytes;) {
    const unsigned first = unsigned(at % 8), count = unsigned(std::min<uintptr_t>(8 - first, start + bytes - at));
    visit(at / 8, uint8_t(((1u << count) - 1) << first), pointer + (at - start));
    at += count;
  }
}

}  // namespace

void check_shared(const Access& access, Cta& block, size_t offset) {
  auto& cells = shared_cells[size_t(block.threads - block.gang->threads.data()) / block.count];
  for_cells(offset, access.bytes, access.pointer, [&](size_t index, uint8_t mask, const char* at) {
    check_cell(cells[index], clocks.gang, mask, access, at, true, &block, offset + size_t(at - access.pointer));
  });
}

void check_static_shared(const Access& access, size_t offset) {
  if (static_cells.size() < (offset + access.bytes) / 8 + 1) static_cells.resize((offset + access.bytes) / 8 + 64);
  for_cells(offset, access.bytes, access.pointer, [&](size_t index, uint8_t mask, const char* at) {
    check_cell(static_cells[index], clocks.gang, mask, access, at, true, nullptr, 0);
  });
}

void check_global(const Access& access) {
  for_cells(reinterpret_cast<uintptr_t>(access.pointer), access.bytes, access.pointer,
            [&](uintptr_t index, uint8_t mask, const char* at) {
              const uintptr_t number = index / (page_bytes / 8);
              auto& recent = recent_pages[number % 256];
              if (recent.number != number || !recent.page) {
                auto& page = pages[number];
                if (!page) page = std::make_unique<Page>();
                recent = {number, page.get()};
              }
              Cell& cell = recent.page->cells[index % (page_bytes / 8)];
              check_cell(cell, global_epoch, mask, access, at, false, nullptr, 0);
            });
}

void begin_shadow() {
  const Gang& gang = worker->gang;
  if (shared_cells.size() < gang.blocks.size()) shared_cells.resize(gang.blocks.size());
  for (size_t i = 0; i < gang.blocks.size(); ++i) {
    const size_t cells = gang.blocks[i]->shared_bytes / 8 + 1;
    if (shared_cells[i].size() < cells) shared_cells[i].resize(cells);
  }
}

void begin_global_shadow() { ++global_epoch; }

void forget_global_shadow() {
  pages.clear();
  for (auto& recent : recent_pages) recent = {0, nullptr};
}

}  // namespace simt::model::check
#endif
