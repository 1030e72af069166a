// The words of what the shadow memory finds: races, missing proxy fences, reads of memory that nobody wrote.
#if defined(SIMT_CHECKED)
#include "check_places.h"
#include "check_shadow.h"

namespace simt::model::check {

namespace {

Cta& block_of(const Access& access) {
  Gang& gang = worker->gang;
  const uint32_t thread = clocks.is_thread(access.who) ? access.who : access.clock->issuer;
  return *gang.threads[thread].cta;
}

bool is_agent(const Access& access) { return !clocks.is_thread(access.who); }

std::string operation(uint32_t who, bool write) {
  switch (clocks.kind(who)) {
    case Agent::tma: return write ? "the TMA load" : "the TMA store";
    case Agent::wgmma: return "the wgmma";
    default: return "the cp.async";
  }
}

// "thread 5 (warp 0) of block (1,0,0)", of any gang so far.
std::string thread_name(uint32_t gang_number, uint32_t who) {
  const Gang& gang = worker->gang;
  const Thread& thread = gang.threads[who];
  if (gang_number == clocks.gang) return describe(thread);
  // Gangs run in order and have the same shape.
  const dim3 grid = thread.grid_size;
  const uint64_t gang_index = gang.index - (clocks.gang - gang_number);
  const uint64_t number = gang_index * gang.blocks.size() + who / clocks.block_threads;
  const unsigned linear = who % clocks.block_threads;
  return "thread " + std::to_string(linear) + " (warp " + std::to_string(linear / 32) + ") of block (" +
         std::to_string(number % grid.x) + "," + std::to_string(number / grid.x % grid.y) + "," +
         std::to_string(number / grid.x / grid.y) + ")";
}

// "thread 5 (warp 0) of block (1,0,0) at f.cu:29", "the TMA load issued at f.cu:48".
std::string author(const Slot& slot, bool in_shared) {
  if (!clocks.is_thread(slot.who)) {
    const bool to_shared = (slot.flags & slot_write) != 0;
    return operation(slot.who, in_shared == to_shared) + " issued at " + line_text(slot.place) +
           (slot.gang == clocks.gang ? "" : " in another block");
  }
  return thread_name(slot.gang, slot.who) + " at " + line_text(slot.place);
}

std::string verb(const Slot& slot) { return slot.flags & slot_write ? "write" : "read"; }

// Is the thread one of the warpgroup whose wgmma this is?
bool issued_by(const Access& access, uint32_t thread) {
  const Thread &one = worker->gang.threads[access.clock->issuer], &other = worker->gang.threads[thread];
  return one.cta == other.cta && one.linear / 128 == other.linear / 128;
}

// What the reader should look for.
std::string advice(const Access& access, const Slot& other, bool in_shared) {
  const bool by_agent = is_agent(access), other_agent = !clocks.is_thread(other.who);
  const bool other_writes = other.flags & slot_write;
  if (other.gang != clocks.gang) return "\n  blocks of a grid are ordered by nothing but atomics and fences";
  if (by_agent && !other_agent) {
    const std::string self = operation(access.who, in_shared == access.write);
    const bool copy = clocks.kind(access.who) == Agent::cp_async, fills = access.write && in_shared;
    const std::string refilled = "the memory is refilled before those who use it have arrived at a barrier";
    if (other.time >= access.clock->time) {
      const char* wait = copy ? "cp_async_wait_group"
                         : fills ? "its mbarrier"
                         : clocks.kind(access.who) == Agent::wgmma ? "wgmma_wait_group" : "bulk_wait_group";
      if (clocks.kind(access.who) == Agent::wgmma && issued_by(access, other.who))
        return "\n  a barrier must lie between what the warps of a warpgroup write and their wgmma";
      return "\n  that came while " + self + " was in flight: " + std::string(wait) + " was not waited for" +
             (fills ? ", or " + refilled : "");
    }
    if (fills) return "\n  " + refilled;
    return in_shared ? "\n  a barrier must lie between them; where memory is used again: bulk_wait_group by the "
                       "issuer, then a barrier"
                     : "";
  }
  if (!other_agent) return "";
  if (by_agent && access.write && in_shared)
    return "\n  the memory is refilled before those who use it have released it";
  if (clocks.kind(other.who) == Agent::wgmma)
    return "\n  the wgmma may still read it: wgmma_wait_group, then an arrival";
  if (clocks.kind(other.who) == Agent::cp_async)
    return "\n  cp_async_wait_group by its issuer, then a barrier, comes first";
  if (other_writes == in_shared) return "\n  the TMA load's mbarrier was not waited for";
  return "\n  the TMA store may still be at work: bulk_wait_group by its issuer, then a barrier";
}

std::string self_name(const Access& access, bool in_shared) {
  if (!is_agent(access)) return std::string("this ") + (access.atomic ? "atomic" : access.write ? "write" : "read");
  return std::string("the ") + (access.write ? "write" : "read") + " by " +
         operation(access.who, in_shared == access.write);
}

}  // namespace

void report(const Access& access, const std::string& message) {
  const Site site = read_line(access.place);
  if (is_agent(access)) fail_issued(message, site, block_of(access));
  fail(message, site);
}

void report_race(const Access& access, const char* at, const Slot& other, bool in_shared) {
  report(access, "data race on " + name_of(at) + ": " + self_name(access, in_shared) + " is not ordered after the " +
                     verb(other) + " by " + author(other, in_shared) + advice(access, other, in_shared));
}

void report_turn(const Access& access, const char* at, const Slot& other) {
  const ReductionId mine{clocks.gang, access.who, access.tick}, its{other.gang, other.who, other.tick};
  const bool other_first = turn_was_passed(its, mine);
  const auto name = [&](const ReductionId& reduction, uint16_t place) {
    return "that of " + thread_name(reduction.gang, clocks.reductions.at(reduction)->issuer) + ", issued at " +
           line_text(place);
  };
  const std::string my_name = name(mine, access.place), its_name = name(its, other.place);
  report(access, "reductions to " + name_of(at) + " by blocks that take turns: " + (other_first ? its_name : my_name) +
                     ", may not be over when " + (other_first ? my_name : its_name) +
                     ", begins\n  bulk_wait_group (not bulk_wait_group_read) by its issuer comes before the turn is "
                     "passed on");
}

void report_proxy(const Access& access, const char* at, const Slot& other) {
  report(access, "no fence.proxy.async between the write to " + name_of(at) + " by " + author(other, true) + " and " +
                     self_name(access, true));
}

void report_unwritten(const Access& access, const char* at, const Cta* block, size_t offset) {
  std::string text = "read of " + name_of(at) + ", which nobody has written in this block (is a barrier missing?)";
  if (block)
    if (const CopyOperation* load = load_in_flight(*block, uint32_t(offset), uint32_t(offset + 1)))
      text = "read of " + name_of(at) + " while the TMA load issued at " + line_text(place_of(load->site)) +
              " is in flight (its mbarrier was not waited for)";
  if (is_agent(access)) text = operation(access.who, false) + ": " + text;
  report(access, text);
}

}  // namespace simt::model::check
#endif
