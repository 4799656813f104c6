// CUDA's built-in vector types, with CUDA's alignments: a 16-byte access through a pointer to one of them is
// a claim that the pointer is 16-byte aligned, and the simulator holds the kernel to it.
#pragma once

#define TRANCHE_SIM_VECTOR2(name, T, alignment)  \
  struct alignas(alignment) name##2 { T x, y; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }

#define TRANCHE_SIM_VECTOR3(name, T) \
  struct name##3 { T x, y, z; };     \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }

#define TRANCHE_SIM_VECTOR4(name, T, alignment)        \
  struct alignas(alignment) name##4 { T x, y, z, w; }; \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

TRANCHE_SIM_VECTOR2(char, signed char, 2)
TRANCHE_SIM_VECTOR2(uchar, unsigned char, 2)
TRANCHE_SIM_VECTOR2(short, short, 4)
TRANCHE_SIM_VECTOR2(ushort, unsigned short, 4)
TRANCHE_SIM_VECTOR2(int, int, 8)
TRANCHE_SIM_VECTOR2(uint, unsigned, 8)
TRANCHE_SIM_VECTOR2(float, float, 8)
TRANCHE_SIM_VECTOR2(longlong, long long, 16)
TRANCHE_SIM_VECTOR2(ulonglong, unsigned long long, 16)
TRANCHE_SIM_VECTOR2(double, double, 16)
TRANCHE_SIM_VECTOR3(int, int)
TRANCHE_SIM_VECTOR3(uint, unsigned)
TRANCHE_SIM_VECTOR3(float, float)
TRANCHE_SIM_VECTOR4(char, signed char, 4)
TRANCHE_SIM_VECTOR4(uchar, unsigned char, 4)
TRANCHE_SIM_VECTOR4(short, short, 8)
TRANCHE_SIM_VECTOR4(ushort, unsigned short, 8)
TRANCHE_SIM_VECTOR4(int, int, 16)
TRANCHE_SIM_VECTOR4(uint, unsigned, 16)
TRANCHE_SIM_VECTOR4(float, float, 16)

#undef TRANCHE_SIM_VECTOR2
#undef TRANCHE_SIM_VECTOR3
#undef TRANCHE_SIM_VECTOR4

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
