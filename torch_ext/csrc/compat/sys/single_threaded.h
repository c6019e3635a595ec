/// Stands before glibc's header of the same name, and takes the shared_ptr and locale shortcuts of libstdc++ away.
///
/// libstdc++ 11 and later reads `__libc_single_threaded`, a variable that only glibc >= 2.32 has; through it a library
/// built on Debian 12 would not load on older systems. A constant of one's own says "threads may exist", which is always
/// safe, and leaves GLIBC_2.17 as the floor.
#pragma once

// Unused in a file that copies no shared_ptr.
[[maybe_unused]] static const char __libc_single_threaded = 0;
