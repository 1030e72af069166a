// Pre-tokenisation written by hand: where the match of the GPT-2 or a GPT-4-like pattern that begins at p ends.
// The kinds of the code points come from Python (minigpt.splitting.character_kinds), so both sides agree by
// construction. A byte that belongs to no valid UTF-8 character is a symbol of its own kind OTHER.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bpe {

enum Kind : uint8_t { OTHER, LETTER, NUMBER, SPACE, NEWLINE, END };  // NEWLINE is \r and \n, SPACE all other whitespace

struct Style {
  bool gpt4;     // else GPT-2
  int digits;    // GPT-4 only: the longest piece of a number
  bool end_run;  // GPT-4 only: whitespace at the end of the text is one piece even if it holds line ends
};

class Splitter {
 public:
  Splitter(Style style, std::string kinds) : style_(style), kinds_(std::move(kinds)) {
    if (kinds_.size() != 0x110000) throw std::invalid_argument("expected the kinds of all 0x110000 code points");
  }

  const char* next(const char* p, const char* end) const { return style_.gpt4 ? next_gpt4(p, end) : next_gpt2(p, end); }

  // The first place from p on where every style surely splits, and splits alike if the text is cut there: an ASCII
  // letter in front, ASCII whitespace behind. `end` where there is none.
  static const char* sure_cut(const char* p, const char* begin, const char* end) {
    for (p = p > begin ? p : begin + 1; p < end; ++p) {
      const char letter = p[-1] | 0x20;
      if ((*p == ' ' || *p == '\n') && letter >= 'a' && letter <= 'z') return p;
    }
    return end;
  }

 private:
  struct Char {
    uint8_t kind, size;
  };

  Char at(const char* text, const char* end) const {
    if (text == end) return {END, 0};
    const auto* p = reinterpret_cast<const unsigned char*>(text);
    if (p[0] < 0x80) return {kind(p[0]), 1};
    return beyond_ascii(p, end - text);
  }

  // Strict UTF-8: no overlong forms, no surrogates, nothing above U+10FFFF.
  Char beyond_ascii(const unsigned char* p, size_t left) const {
    const auto follows = [&](size_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
    if (p[0] >= 0xC2 && p[0] <= 0xDF && follows(1)) return {kind((p[0] & 0x1F) << 6 | (p[1] & 0x3F)), 2};
    if ((p[0] & 0xF0) == 0xE0 && follows(1) && follows(2)) {
      const uint32_t code = (p[0] & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
      if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {kind(code), 3};
    }
    if ((p[0] & 0xF8) == 0xF0 && follows(1) && follows(2) && follows(3)) {
      const uint32_t code = (p[0] & 7) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
      if (code >= 0x10000 && code <= 0x10FFFF) return {kind(code), 4};
    }
    return {OTHER, 1};
  }

  uint8_t kind(uint32_t code) const { return kinds_[code]; }

  const char* run(const char* p, const char* end, uint8_t kind) const {
    for (Char c; (c = at(p, end)).kind == kind;) p += c.size;
    return p;
  }

  // 's 't 're 've 'm 'll 'd, or nullptr. Without regard to case, s is also ſ (U+017F), its case-folded equal.
  static const char* contraction(const char* p, const char* end, bool fold) {
    const char bit = fold ? 0x20 : 0;
    const char a = end - p > 1 ? p[1] | bit : 0, b = end - p > 2 ? p[2] | bit : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
    return fold && end - p > 2 && p[1] == '\xC5' && p[2] == '\xBF' ? p + 3 : nullptr;
  }

  const char* next_gpt2(const char* p, const char* end) const {
    if (*p == '\'') {
      if (const char* q = contraction(p, end, false)) return q;
    }
    const char* q = p + (*p == ' ');
    const Char c = at(q, end);
    if (c.kind == LETTER || c.kind == NUMBER || c.kind == OTHER) return run(q + c.size, end, c.kind);
    return whitespace(p, end);
  }

  const char* next_gpt4(const char* p, const char* end) const {
    if (*p == '\'') {
      if (const char* q = contraction(p, end, true)) return q;
    }
    const Char c = at(p, end);
    if (c.kind == LETTER) return run(p + c.size, end, LETTER);
    if (c.kind == NUMBER) return number(p, end);
    if (c.kind == NEWLINE) return whitespace(p, end);
    const char* q = p + c.size;
    const Char second = at(q, end);
    if (second.kind == LETTER) return run(q + second.size, end, LETTER);
    if (c.kind == OTHER || (*p == ' ' && second.kind == OTHER)) {
      q = run(q, end, OTHER);
      while (q < end && (*q == '\r' || *q == '\n')) ++q;
      return q;
    }
    return whitespace(p, end);
  }

  const char* number(const char* p, const char* end) const {
    Char c;
    for (int i = 0; i < style_.digits && (c = at(p, end)).kind == NUMBER; ++i) p += c.size;
    return p;
  }

  // Before something else, the last character of a run stays with what follows; GPT-4 ends a run after its last line
  // end.
  const char* whitespace(const char* p, const char* end) const {
    const char *q = p, *last = p, *line = nullptr;
    for (Char c; (c = at(q, end)).kind == SPACE || c.kind == NEWLINE;) {
      last = q;
      q += c.size;
      if (c.kind == NEWLINE) line = q;
    }
    if (style_.gpt4 && line && !(q == end && style_.end_run)) return line;
    return q == end || last == p ? q : last;
  }

  Style style_;
  std::string kinds_;
};

}  // namespace bpe
