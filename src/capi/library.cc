// libcompact.so: the archive behind the C interface. This file is empty because a target needs one source.
