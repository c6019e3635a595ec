/// Files and memory mapped into the process, as values that own them.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

namespace torch_ext::runtime {

/// Memory from mmap, given back at the end.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Mapping();

  /// Memory of this process alone, zero, in large pages where the system has them.
  static Mapping anonymous(size_t bytes);
  /// The first `bytes` of a file, to be read or, for a file of ours, written. Closing `fd` does not end it.
  static Mapping of_file(int fd, size_t bytes, bool writable, const std::string& name);

  char* data() { return data_; }
  const char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Mapping& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

/// A file descriptor, closed at the end.
class File {
 public:
  explicit File(int fd = -1) : fd_(fd) {}
  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~File();

  /// Opens a regular file to be read. Throws kNotFound where there is none.
  static File open_to_read(const std::string& path);

  int fd() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  /// Throws unless it is a regular file, or one of memory.
  size_t size(const std::string& name) const;

 private:
  int fd_;
};

/// Takes the pages of some bytes out of memory. They must be of a file that is mapped shared and read-only, which they are
/// read from again when somebody looks: what others have in these pages is not lost either.
void forget_pages(const void* data, size_t bytes);

/// "cannot ...: No such file" from errno, as an error of kind kSystem.
[[noreturn]] void fail_by_errno(const std::string& what);

}  // namespace torch_ext::runtime
