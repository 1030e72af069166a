// wgmma: the tensor cores of Hopper, one warpgroup (128 threads) an instruction, d (64 x N, f32) = a (64 x 16) b (16 x N)
// + d. B lies in shared memory, A there or in registers; both shared-memory operands are named by a matrix descriptor.
//
// Which element is where: thread t of the warpgroup holds in d[i]
//   row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2),  column 8 (i / 4) + 2 (t % 4) + i % 2
// and in A from registers, a[i], i = 0..3, the pair
//   row 16 (t / 32) + (t % 32) / 4 + 8 (i % 2),  columns 8 (i / 2) + 2 (t % 4) and the next.
// wgmma is asynchronous: registers and shared memory belong to it from the instruction to wgmma_wait_group.
#pragma once
#include "core.cuh"

namespace ptx {

// The descriptor of a tile in shared memory (PTX ISA, "Matrix descriptor format"). With 128-byte swizzle:
//   K-major     rows of 64 elements (128 bytes); 8 rows are an atom, `stride` = bytes from one atom to the next, 1024 when
//               they are dense; `leading` is ignored. 16 further columns: + 32 bytes on the address.
//   MN-major    columns of 64 elements; 8 of them are an atom; `stride` = bytes between atoms along K, `leading` between
//               the groups of 64 along M or N. 16 further values of K: + 2 * stride.
PTX_INLINE uint64_t matrix_descriptor(const void* tile, simt::Swizzle swizzle, uint32_t leading,
                                      uint32_t stride SIMT_SITE) {
  const uint32_t address = PTX(shared_address(tile), shared_address(tile, site));
  const uint64_t mode = swizzle == simt::Swizzle::b128 ? 1 : swizzle == simt::Swizzle::b64 ? 2 : swizzle == simt::Swizzle::b32 ? 3 : 0;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t((leading & 0x3ffff) >> 4) << 16 |
         uint64_t((stride & 0x3ffff) >> 4) << 32 | mode << 62;
}

// Before the first wgmma, and whenever threads have touched the registers of d or a since.
PTX_INLINE void wgmma_fence(SIMT_SITE_ONLY) {
  PTX(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"), simt::model::wgmma_fence(site));
}
PTX_INLINE void wgmma_commit_group(SIMT_SITE_ONLY) {
  PTX(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"), simt::model::wgmma_commit_group(site));
}
// At most `pending` of the warpgroup's groups are unfinished.
template <int pending>
PTX_INLINE void wgmma_wait_group(SIMT_SITE_ONLY) {
  PTX(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"),
      simt::model::wgmma_wait_group(pending, site));
}

// The operand lists: N / 2 registers, each list made from the one before.
// clang-format off
#define PTX_REGISTERS_8 "%0,%1,%2,%3"
#define PTX_REGISTERS_16 PTX_REGISTERS_8 ",%4,%5,%6,%7"
#define PTX_REGISTERS_24 PTX_REGISTERS_16 ",%8,%9,%10,%11"
#define PTX_REGISTERS_32 PTX_REGISTERS_24 ",%12,%13,%14,%15"
#define PTX_REGISTERS_40 PTX_REGISTERS_32 ",%16,%17,%18,%19"
#define PTX_REGISTERS_48 PTX_REGISTERS_40 ",%20,%21,%22,%23"
#define PTX_REGISTERS_56 PTX_REGISTERS_48 ",%24,%25,%26,%27"
#define PTX_REGISTERS_64 PTX_REGISTERS_56 ",%28,%29,%30,%31"
#define PTX_REGISTERS_72 PTX_REGISTERS_64 ",%32,%33,%34,%35"
#define PTX_REGISTERS_80 PTX_REGISTERS_72 ",%36,%37,%38,%39"
#define PTX_REGISTERS_88 PTX_REGISTERS_80 ",%40,%41,%42,%43"
#define PTX_REGISTERS_96 PTX_REGISTERS_88 ",%44,%45,%46,%47"
#define PTX_REGISTERS_104 PTX_REGISTERS_96 ",%48,%49,%50,%51"
#define PTX_REGISTERS_112 PTX_REGISTERS_104 ",%52,%53,%54,%55"
#define PTX_REGISTERS_120 PTX_REGISTERS_112 ",%56,%57,%58,%59"
#define PTX_REGISTERS_128 PTX_REGISTERS_120 ",%60,%61,%62,%63"
#define PTX_REGISTERS_136 PTX_REGISTERS_128 ",%64,%65,%66,%67"
#define PTX_REGISTERS_144 PTX_REGISTERS_136 ",%68,%69,%70,%71"
#define PTX_REGISTERS_152 PTX_REGISTERS_144 ",%72,%73,%74,%75"
#define PTX_REGISTERS_160 PTX_REGISTERS_152 ",%76,%77,%78,%79"
#define PTX_REGISTERS_168 PTX_REGISTERS_160 ",%80,%81,%82,%83"
#define PTX_REGISTERS_176 PTX_REGISTERS_168 ",%84,%85,%86,%87"
#define PTX_REGISTERS_184 PTX_REGISTERS_176 ",%88,%89,%90,%91"
#define PTX_REGISTERS_192 PTX_REGISTERS_184 ",%92,%93,%94,%95"
#define PTX_REGISTERS_200 PTX_REGISTERS_192 ",%96,%97,%98,%99"
#define PTX_REGISTERS_208 PTX_REGISTERS_200 ",%100,%101,%102,%103"
#define PTX_REGISTERS_216 PTX_REGISTERS_208 ",%104,%105,%106,%107"
#define PTX_REGISTERS_224 PTX_REGISTERS_216 ",%108,%109,%110,%111"
#define PTX_REGISTERS_232 PTX_REGISTERS_224 ",%112,%113,%114,%115"
#define PTX_REGISTERS_240 PTX_REGISTERS_232 ",%116,%117,%118,%119"
#define PTX_REGISTERS_248 PTX_REGISTERS_240 ",%120,%121,%122,%123"
#define PTX_REGISTERS_256 PTX_REGISTERS_248 ",%124,%125,%126,%127"
#define PTX_OUTPUTS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PTX_OUTPUTS_16 PTX_OUTPUTS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PTX_OUTPUTS_24 PTX_OUTPUTS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define PTX_OUTPUTS_32 PTX_OUTPUTS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PTX_OUTPUTS_40 PTX_OUTPUTS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define PTX_OUTPUTS_48 PTX_OUTPUTS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PTX_OUTPUTS_56 PTX_OUTPUTS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define PTX_OUTPUTS_64 PTX_OUTPUTS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PTX_OUTPUTS_72 PTX_OUTPUTS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define PTX_OUTPUTS_80 PTX_OUTPUTS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PTX_OUTPUTS_88 PTX_OUTPUTS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define PTX_OUTPUTS_96 PTX_OUTPUTS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PTX_OUTPUTS_104 PTX_OUTPUTS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define PTX_OUTPUTS_112 PTX_OUTPUTS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PTX_OUTPUTS_120 PTX_OUTPUTS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define PTX_OUTPUTS_128 PTX_OUTPUTS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PTX_OUTPUTS_136 PTX_OUTPUTS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define PTX_OUTPUTS_144 PTX_OUTPUTS_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PTX_OUTPUTS_152 PTX_OUTPUTS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define PTX_OUTPUTS_160 PTX_OUTPUTS_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PTX_OUTPUTS_168 PTX_OUTPUTS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define PTX_OUTPUTS_176 PTX_OUTPUTS_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PTX_OUTPUTS_184 PTX_OUTPUTS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define PTX_OUTPUTS_192 PTX_OUTPUTS_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PTX_OUTPUTS_200 PTX_OUTPUTS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define PTX_OUTPUTS_208 PTX_OUTPUTS_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PTX_OUTPUTS_216 PTX_OUTPUTS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define PTX_OUTPUTS_224 PTX_OUTPUTS_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PTX_OUTPUTS_232 PTX_OUTPUTS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define PTX_OUTPUTS_240 PTX_OUTPUTS_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PTX_OUTPUTS_248 PTX_OUTPUTS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define PTX_OUTPUTS_256 PTX_OUTPUTS_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// clang-format on

template <int N>
struct WgmmaInstruction;

// The numbers are those of the operands that follow the N / 2 registers of d.
#define PTX_WGMMA_SS(N, TYPE, A, B, SCALE, TA, TB)                                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #SCALE ", 0;\n"                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PTX_REGISTERS_##N       \
               "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}"                                       \
               : PTX_OUTPUTS_##N                                                                            \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(a_mn_major)), "n"(int(b_mn_major)))
#define PTX_WGMMA_RS(N, TYPE, A0, A1, A2, A3, B, SCALE, TB)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #SCALE ", 0;\n"                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PTX_REGISTERS_##N       \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}"                \
               : PTX_OUTPUTS_##N                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(b_mn_major)))
#if defined(__CUDACC__)
#define PTX_WGMMA(N, I0, I1, I2, I3, I4, I5, I6)                                                            \
  template <>                                                                                               \
  struct WgmmaInstruction<N> {                                                                              \
    template <bool bf16, bool a_mn_major, bool b_mn_major>                                                  \
    PTX_INLINE static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {             \
      if constexpr (bf16) PTX_WGMMA_SS(N, "bf16", I0, I1, I2, I3, I4);                                      \
      else PTX_WGMMA_SS(N, "f16", I0, I1, I2, I3, I4);                                                      \
    }                                                                                                       \
    template <bool bf16, bool b_mn_major>                                                                   \
    PTX_INLINE static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      if constexpr (bf16) PTX_WGMMA_RS(N, "bf16", I0, I1, I2, I3, I4, I5, I6);                              \
      else PTX_WGMMA_RS(N, "f16", I0, I1, I2, I3, I4, I5, I6);                                              \
    }                                                                                                       \
  };
PTX_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
PTX_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
PTX_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
PTX_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
PTX_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
PTX_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
PTX_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
PTX_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
PTX_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
PTX_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
PTX_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
PTX_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
PTX_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
PTX_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
PTX_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
PTX_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
PTX_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
PTX_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
PTX_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
PTX_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
PTX_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
PTX_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
PTX_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
PTX_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
PTX_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
PTX_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
PTX_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
PTX_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
PTX_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
PTX_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
PTX_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
PTX_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)
#undef PTX_WGMMA
#endif

// d = a b, or d += a b where `accumulate`. Both operands in shared memory.
template <int N, class T, bool a_mn_major = false, bool b_mn_major = false>
PTX_INLINE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate SIMT_SITE) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0, "wgmma takes N = 8, 16, .., 256");
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  PTX((WgmmaInstruction<N>::template shared<bf16, a_mn_major, b_mn_major>(d, a, b, accumulate)),
      simt::model::wgmma(d, {N, bf16 ? simt::DataType::bf16 : simt::DataType::f16, a, b, nullptr, a_mn_major, b_mn_major, accumulate}, site));
}
// The same with A, 64 x 16, in registers.
template <int N, class T, bool b_mn_major = false>
PTX_INLINE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate SIMT_SITE) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0, "wgmma takes N = 8, 16, .., 256");
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  PTX((WgmmaInstruction<N>::template registers<bf16, b_mn_major>(d, a, b, accumulate)),
      simt::model::wgmma(d, {N, bf16 ? simt::DataType::bf16 : simt::DataType::f16, 0, b, a, false, b_mn_major, accumulate}, site));
}

}  // namespace ptx
