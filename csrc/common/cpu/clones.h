// Function multiversioning for x86-64 levels, dispatched when the library is loaded; a no-op on other platforms.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTGEN_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), visibility("hidden")))
#else
#define FASTGEN_CLONES __attribute__((visibility("hidden")))
#endif
