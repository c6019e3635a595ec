/// Definitions that keep the library loadable on systems whose libstdc++ is older than the compiler's.
///
/// GCC 12's headers call functions that manylinux_2_28 (GLIBCXX_3.4.25 at most) does not have. Definitions of one's own,
/// invisible from outside (exports.map), take the place of the shared library's. Only single members are instantiated:
/// whole classes would bring copies of the locale facets' ids with them, and streams that find no facet throw.

#include <new>
#include <sstream>

#if defined(__GLIBCXX__)

/// std::__throw_bad_array_new_length (GLIBCXX_3.4.29), called by std::vector and std::allocator. The name is given by an
/// assembler label, since the standard header has already declared the function with default visibility.
extern "C" [[noreturn]] __attribute__((visibility("hidden"), used)) void torch_ext_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");

extern "C" void torch_ext_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

/// Default constructors (GLIBCXX_3.4.26): STD_TORCH_CHECK writes its message to a stringstream.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

#if __cplusplus >= 202002L && _GLIBCXX_USE_CXX11_ABI
/// What str() of a string stream is in C++20 (GLIBCXX_3.4.29).
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
#endif

#endif
