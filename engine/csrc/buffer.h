// What the kernels share: constants, aligned memory, the heaviest candidates of a pixel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace els {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kUnit = 1.0 / (1 << 24);  // unit roundoff of float32
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Exponent of a candidate that must not count.
constexpr float kNever = -1e30f;
// Exponent of the reference before any candidate has counted.
constexpr float kNothing = -1e29f;
constexpr double kNowhere = std::numeric_limits<double>::infinity();
// Squared distances up to this can be added up in float32, and are below those of lanes without an
// image.
constexpr double kFurthest = 1e28;

// Zeroed memory that begins at a cache line.
template <typename T>
class Buffer {
 public:
  void resize(std::size_t count) {
    storage_.assign(count * sizeof(T) + 63, 0);
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    data_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }

 private:
  std::vector<unsigned char> storage_;
  T* data_ = nullptr;
};

// The heaviest candidates of one pixel, best first; ties go to the lower address.
class TopList {
 public:
  TopList(int capacity, double* distances, std::int64_t* addresses)
      : capacity_(capacity), distances_(distances), addresses_(addresses) {}

  double worst() const { return distances_[capacity_ - 1]; }

  void insert(double distance, std::int64_t address) {
    int slot = capacity_ - 1;
    if (!before(distance, address, slot)) return;
    for (; slot > 0 && before(distance, address, slot - 1); --slot) {
      distances_[slot] = distances_[slot - 1];
      addresses_[slot] = addresses_[slot - 1];
    }
    distances_[slot] = distance;
    addresses_[slot] = address;
  }

 private:
  bool before(double distance, std::int64_t address, int slot) const {
    return distance < distances_[slot] ||
           (distance == distances_[slot] && (addresses_[slot] < 0 || address < addresses_[slot]));
  }

  int capacity_;
  double* distances_;
  std::int64_t* addresses_;
};

}  // namespace els
