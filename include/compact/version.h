/// Version of the library. Before 1.0 a minor version may change the C++ API.
#pragma once

#define CA_VERSION_MAJOR 0
#define CA_VERSION_MINOR 1
#define CA_VERSION_PATCH 0
#define CA_VERSION_STRING "0.1.0"
