// Functions of the libraries that Python calls through ctypes. All other symbols are hidden.
#pragma once

#define FASTGEN_EXPORTED extern "C" __attribute__((visibility("default")))
