"""Imports of what was kept elsewhere: the old bot's SQLite file, Discord's exported chats, documents."""
