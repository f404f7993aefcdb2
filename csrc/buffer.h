// Scratch memory of a call.
#ifndef SEPCONV_BUFFER_H_
#define SEPCONV_BUFFER_H_

#include <cstddef>
#include <cstdint>

namespace sepconv {

inline constexpr int64_t kBufferAlignment = 64;  // one cache line, one AVX-512 vector

inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline int64_t CeilDiv(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t FloorDiv(int64_t value, int64_t divisor) {
  return value >= 0 ? value / divisor : -CeilDiv(-value, divisor);
}

// Aligned memory, uninitialised. A few freed blocks are kept per calling thread, because returning
// memory to the system and faulting its pages in again costs as much as a small layer. Throws
// std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  T* As() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Lays several arrays out in one block: first add up, then hand out.
class Layout64 {
 public:
  // Offset in bytes of an array of `count` elements of `element_size` bytes.
  int64_t Add(int64_t count, int64_t element_size) {
    const int64_t offset = bytes_;
    bytes_ += RoundUp(count * element_size, kBufferAlignment);
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// The scratch memory of a call: what all threads share, then what each has for itself.
struct CallLayout {
  Layout64 shared, own;

  int64_t Bytes(int64_t threads) const { return shared.bytes() + threads * own.bytes(); }
  char* MemoryOf(int64_t worker, char* memory) const { return memory + Bytes(worker); }
};

}  // namespace sepconv

#endif  // SEPCONV_BUFFER_H_
