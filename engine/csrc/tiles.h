// Byte products on the matrix unit (AMX) of recent x86 processors, by its six instructions.
//
// Written as assembly, since compilers offer the intrinsics only where all code may use the unit.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define ELS_HAS_TILES 1

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace els {

// Whether the processor has the unit and the system lets this process use it.
inline bool can_use_tiles() {
  // AMX-TILE and AMX-INT8 in EDX of CPUID leaf 7 (Intel's manual, volume 2).
  constexpr unsigned kTileBit = 1u << 24;
  constexpr unsigned kByteBit = 1u << 25;
  // ARCH_REQ_XCOMP_PERM and XTILEDATA of Linux (asm/prctl.h; Documentation/arch/x86/xstate.rst).
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kTileBit) == 0 || (d & kByteBit) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Rows of a tile, at most.
constexpr int kTileRows = 16;
// Bytes of a row, at most.
constexpr int kTileBytes = 64;

// A query's 16 bits as two signed bytes: 256 high + low.
struct Digits {
  std::int8_t high, low;
};

inline Digits digits_of(int value) {
  const int low = static_cast<std::int8_t>(value & 0xff);
  return {static_cast<std::int8_t>((value - low) >> 8), static_cast<std::int8_t>(low)};
}

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

inline void load_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

inline void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
inline void load_tile(const void* data, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* data, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// sums += bytes (unsigned) x others (signed)
template <int kSums, int kBytes, int kOthers>
inline void multiply_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kBytes), "i"(kOthers));
}

}  // namespace els
#endif
