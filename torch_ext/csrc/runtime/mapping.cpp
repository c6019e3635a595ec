#include "runtime/mapping.h"

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime/error.h"

namespace torch_ext::runtime {

void fail_by_errno(const std::string& what) {
  const int code = errno;
  const ErrorCode kind = code == ENOENT   ? ErrorCode::kNotFound
                         : code == ENOMEM ? ErrorCode::kMemory
                                          : ErrorCode::kSystem;
  fail(kind, what, ": ", std::strerror(code));
}

Mapping::~Mapping() {
  if (data_) munmap(data_, bytes_);
}

static char* map(size_t bytes, int protection, int flags, int fd, const std::string& name) {
  void* const data = mmap(nullptr, bytes, protection, flags, fd, 0);
  if (data == MAP_FAILED) fail_by_errno(joined("cannot map ", bytes, " bytes of ", name));
  return static_cast<char*>(data);
}

Mapping Mapping::anonymous(size_t bytes) {
  Mapping m;
  m.data_ = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, "memory");
  m.bytes_ = bytes;
  madvise(m.data_, bytes, MADV_HUGEPAGE);
  return m;
}

Mapping Mapping::of_file(int fd, size_t bytes, bool writable, const std::string& name) {
  Mapping m;
  m.data_ = map(bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, name);
  m.bytes_ = bytes;
  madvise(m.data_, bytes, MADV_HUGEPAGE);  // means something for files of memory alone
  // A file that a process can write to is never sealed: not even a child that is forked meanwhile.
  if (writable) madvise(m.data_, bytes, MADV_DONTFORK);
  return m;
}

void forget_pages(const void* data, size_t bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data), start = begin / page * page;
  // Memory is saved, or it is not: a failure changes no result.
  if (bytes) madvise(reinterpret_cast<void*>(start), begin + bytes - start, MADV_DONTNEED);
}

File::~File() {
  if (fd_ >= 0) close(fd_);
}

File File::open_to_read(const std::string& path) {
  File file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // to open a pipe would wait for its writer
  if (file.fd_ < 0) fail_by_errno("cannot open " + path);
  return file;
}

size_t File::size(const std::string& name) const {
  struct stat status;  // the library's fstat would need a newer one than the rest
  if (syscall(SYS_fstat, fd_, &status) != 0) fail_by_errno("cannot look at " + name);
  if (!S_ISREG(status.st_mode)) fail(ErrorCode::kValue, name, " is not a regular file");
  return static_cast<size_t>(status.st_size);
}

}  // namespace torch_ext::runtime
