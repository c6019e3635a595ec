/// Definitions that keep the library loadable on systems whose libstdc++ is older than the compiler's.
///
/// GCC 12's headers call two functions that manylinux_2_28 (GLIBCXX_3.4.25 at most) does not have. Definitions of one's
/// own, invisible from outside (exports.map), take the place of the shared library's.

// Instantiate here what libstdc++'s headers declare `extern template`.
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)

/// std::__throw_bad_array_new_length (GLIBCXX_3.4.29), called by std::vector and std::allocator. The name is given by an
/// assembler label, since the standard header has already declared the function with default visibility.
extern "C" [[noreturn]] __attribute__((visibility("hidden"), used)) void torch_ext_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");

extern "C" void torch_ext_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

/// std::stringstream's default constructor (GLIBCXX_3.4.26), used by the messages of STD_TORCH_CHECK.
template std::basic_stringstream<char>::basic_stringstream();

/// std::ostringstream's (GLIBCXX_3.4.26), for messages of our own.
template std::basic_ostringstream<char>::basic_ostringstream();

#endif
