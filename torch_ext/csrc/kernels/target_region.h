/// Target regions: code between TARGET_REGION_BEGIN(...) and TARGET_REGION_END is compiled for more than the ABI
/// baseline. Include every standard header before the region: a template instantiated inside it would carry the
/// wider instructions into code that other CPUs run.
///
///   TARGET_REGION_BEGIN(gcc_target_string, clang_target_string)
#pragma once

#define TORCH_EXT_PRAGMA(x) _Pragma(#x)

#if defined(__clang__)
#define TARGET_REGION_BEGIN(gcc_target, clang_target) \
  TORCH_EXT_PRAGMA(clang attribute push(__attribute__((target(clang_target))), apply_to = function))
#define TARGET_REGION_END TORCH_EXT_PRAGMA(clang attribute pop)
#else
#define TARGET_REGION_BEGIN(gcc_target, clang_target) \
  TORCH_EXT_PRAGMA(GCC push_options) TORCH_EXT_PRAGMA(GCC target(gcc_target))
#define TARGET_REGION_END TORCH_EXT_PRAGMA(GCC pop_options)
#endif
