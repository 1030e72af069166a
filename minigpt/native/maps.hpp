// The two hash tables of the tokenizer, both with open addressing: bytes -> 0, 1, 2, ... and (left, right) -> a value.
// Keys are never removed; ByteMap::clear forgets all of them. Neither is made to withstand keys chosen to collide.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace bpe {

// Both halves of the 128-bit product: every bit of the input reaches the low bits.
inline uint64_t mix(uint64_t a, uint64_t b) {
  const __uint128_t product = static_cast<__uint128_t>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

template <class Word>
inline uint64_t load(const char* p) {
  Word word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

inline uint64_t hash_bytes(const char* p, size_t n) {
  uint64_t state = n * 0x9E3779B97F4A7C15u, last = 0;
  for (; n > 8; p += 8, n -= 8) state = mix(state ^ load<uint64_t>(p), 0xD6E8FEB86659FD93u);
  if (n == 8) {
    last = load<uint64_t>(p);
  } else if (n >= 4) {  // two loads that overlap in the middle
    last = load<uint32_t>(p) | load<uint32_t>(p + n - 4) << 32;
  } else if (n > 0) {
    last = load<uint8_t>(p) | load<uint8_t>(p + n / 2) << 8 | load<uint8_t>(p + n - 1) << 16;
  }
  return mix(state ^ last, 0xA0761D6478BD642Fu);
}

// Distinct byte strings, numbered in the order in which they came; the strings themselves lie in one arena.
class ByteMap {
 public:
  static constexpr uint32_t NONE = UINT32_MAX;

  ByteMap() : slots_(1 << 10) {}

  size_t size() const { return entries_.size(); }

  std::string_view operator[](uint32_t index) const {
    return {arena_.data() + entries_[index].offset, entries_[index].length};
  }

  uint32_t find(const char* p, size_t n) const {
    const uint64_t hash = hash_bytes(p, n);
    const Slot& slot = slots_[place(p, n, hash)];
    return slot.number ? slot.number - 1 : NONE;
  }

  // The number of the string, which is size() before the call if it is new.
  uint32_t find_or_insert(const char* p, size_t n) {
    const uint64_t hash = hash_bytes(p, n);
    Slot* slot = &slots_[place(p, n, hash)];
    if (slot->number) return slot->number - 1;
    *slot = {static_cast<uint32_t>(hash >> 32), static_cast<uint32_t>(entries_.size() + 1)};
    entries_.push_back({arena_.size(), static_cast<uint32_t>(n)});
    arena_.insert(arena_.end(), p, p + n);
    if (2 * entries_.size() > slots_.size()) grow();
    return static_cast<uint32_t>(entries_.size() - 1);
  }

  void clear() {
    slots_.assign(slots_.size(), {});
    entries_.clear();
    arena_.clear();
  }

 private:
  struct Slot {
    uint32_t tag = 0, number = 0;  // the upper half of the hash; 1 + the string's number, 0 in an empty slot
  };
  struct Entry {
    size_t offset;
    uint32_t length;
  };

  size_t place(const char* p, size_t n, uint64_t hash) const {
    const size_t mask = slots_.size() - 1;
    const uint32_t tag = static_cast<uint32_t>(hash >> 32);
    for (size_t at = hash & mask;; at = (at + 1) & mask) {
      const Slot& slot = slots_[at];
      if (!slot.number) return at;
      if (slot.tag != tag) continue;
      const Entry& entry = entries_[slot.number - 1];
      if (entry.length == n && !std::memcmp(arena_.data() + entry.offset, p, n)) return at;
    }
  }

  void grow() {
    std::vector<Slot> wider(4 * slots_.size());
    const size_t mask = wider.size() - 1;
    for (uint32_t number = 1; number <= entries_.size(); ++number) {
      const Entry& entry = entries_[number - 1];
      const uint64_t hash = hash_bytes(arena_.data() + entry.offset, entry.length);
      size_t at = hash & mask;
      while (wider[at].number) at = (at + 1) & mask;
      wider[at] = {static_cast<uint32_t>(hash >> 32), number};
    }
    slots_.swap(wider);
  }

  std::vector<Slot> slots_;
  std::vector<Entry> entries_;
  std::vector<char> arena_;
};

// (left, right) -> Value.
template <class Value>
class PairMap {
 public:
  PairMap() : slots_(1 << 10) {}

  const Value* find(uint32_t left, uint32_t right) const {
    const Slot& slot = slots_[place(slots_, key_of(left, right))];
    return slot.key == EMPTY ? nullptr : &slot.value;
  }

  // The value of the pair, `fresh` if the pair was not there. The reference lives until the next call.
  Value& find_or_insert(uint32_t left, uint32_t right, const Value& fresh) {
    if (2 * ++size_ > slots_.size()) grow();  // size_ is an upper bound: it is taken back below
    const uint64_t key = key_of(left, right);
    Slot& slot = slots_[place(slots_, key)];
    if (slot.key == EMPTY) {
      slot = {key, fresh};
    } else {
      --size_;
    }
    return slot.value;
  }

 private:
  static constexpr uint64_t EMPTY = UINT64_MAX;  // token ids end before 2^31, so no pair has this key
  struct Slot {
    uint64_t key = EMPTY;
    Value value{};
  };

  static uint64_t key_of(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

  static size_t place(const std::vector<Slot>& slots, uint64_t key) {
    const size_t mask = slots.size() - 1;
    size_t at = mix(key ^ 0x9E3779B97F4A7C15u, 0xD6E8FEB86659FD93u) & mask;
    while (slots[at].key != key && slots[at].key != EMPTY) at = (at + 1) & mask;
    return at;
  }

  void grow() {
    std::vector<Slot> wider(4 * slots_.size());
    for (const Slot& slot : slots_) {
      if (slot.key != EMPTY) wider[place(wider, slot.key)] = slot;
    }
    slots_.swap(wider);
  }

  std::vector<Slot> slots_;
  size_t size_ = 0;
};

}  // namespace bpe
