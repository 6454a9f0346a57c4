"""Operations: settings at run time, the log file, the store's room, and why all is not well."""
