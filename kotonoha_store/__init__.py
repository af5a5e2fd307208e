"""The PostgreSQL memory of a conversational AI."""
