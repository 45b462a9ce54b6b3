//! Chats of an open model: their ids as they go on, the life of their keys and values, their files.
//!
//! Decisions: docs/design/engine.md

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use super::Engine;
use crate::error::{Error, Result};
use crate::kv::file::{self, KvFile};
use crate::kv::phases::Phases;
use crate::kv::table::Table;
use crate::kv::tree::Holder;
use crate::model::Want;
use crate::runtime::prefill::Prefill;
use crate::runtime::prefixes::Prefixes;
use crate::runtime::prompt::Prompt;
use crate::runtime::stream::Stream;
use crate::system::fork::ForkGuard;
use crate::system::sync::{in_background, lock};
use crate::system::task::Task;
use crate::text::chat::Message;
use crate::text::tokenizer::Special;

/// The text of a file that names the scope of its chat.
const SCOPE: &str = "scope";

impl Engine {
    /// The ids of a conversation that goes on. `ids` are those of its beginning, whose text is `text`: the last rendering
    /// and the answer to it. They are kept as they are, so that an answer is never tokenized again. If the rendering does
    /// not begin with that text, as many of them are kept as are its first ids.
    pub fn continue_messages(&self, messages: &[Message], text: &str, ids: &[u32]) -> Result<Continuation> {
        let parts = self.parts()?;
        let rendered = parts.template.render(messages)?;
        // Some templates strip messages.
        for known in [text, text.trim_end()] {
            let Some(rest) = rendered.text.strip_prefix(known) else { continue };
            let user = rendered.user.iter().filter(|range| range.end > known.len());
            let user: Vec<_> =
                user.map(|range| range.start.saturating_sub(known.len())..range.end - known.len()).collect();
            let more = parts.tokenizer.encode(rest, Special::Outside(&user))?;
            // Other tokens could depend on the text before them.
            if more.first().is_some_and(|&id| parts.tokenizer.is_added(id)) {
                return Ok(Continuation { text: rendered.text, ids: [ids, &more].concat(), kept: ids.len() });
            }
        }
        let all = parts.tokenizer.encode(&rendered.text, Special::Outside(&rendered.user))?;
        let kept = all.iter().zip(ids).take_while(|(a, b)| a == b).count();
        Ok(Continuation { text: rendered.text, ids: all, kept })
    }

    /// Begins to hold keys and values for a chat.
    pub fn chat(&self) -> Result<Chat> {
        self.parts()?;
        let life = Arc::new(());
        self.prefixes().add_chat(&life);
        Ok(Chat {
            life: Mutex::new(Some(life)),
            prefixes: self.prefixes().clone(),
            fork_guard: self.scheduler.fork_guard(),
        })
    }

    /// Writes a chat: work for a thread of its own. `prompt`: all its ids, and the phases of those with keys and values. Without
    /// `kv` they are not written. What is not held is computed before.
    pub fn save_chat(
        &self,
        path: PathBuf,
        prompt: Prompt,
        texts: BTreeMap<String, String>,
        kv: bool,
    ) -> Result<impl FnOnce(&Task) -> Result<()> + Send + 'static> {
        let (parts, prefixes, computed) = (self.parts()?, self.prefixes().clone(), prompt.phases.len());
        let prompt = Prompt { scope: scope(&texts), ..prompt };
        self.check_ids_of_chat(&prompt.ids)?;
        let held = Prompt { ids: prompt.ids[..computed].to_vec(), ..prompt.clone() };
        let stream = (kv && computed > 0).then(|| self.prefill(held, true)).transpose()?;
        Ok(move |task: &Task| {
            let table = stream.map(|stream| whole(&stream, task)).transpose()?;
            let columns: Vec<_> = table.iter().flat_map(|table| table.columns().cloned()).collect();
            let contents = file::Contents {
                fingerprint: &parts.kv_fingerprint,
                start: 0,
                ids: &prompt.ids,
                runs: &prompt.phases.runs(),
                columns: &columns,
                computed: if table.is_some() { computed } else { 0 },
                metadata: &texts,
            };
            let written = file::write(&path, &contents, task).map(drop);
            drop((columns, table));
            prefixes.trim();
            written
        })
    }

    /// Opens the file of a chat: work for a thread of its own. Its keys and values are used from then on if they
    /// are those of this model. `strict`: else it is an error.
    pub fn load_chat(
        &self,
        path: PathBuf,
        holder: Holder,
        strict: bool,
    ) -> Result<impl FnOnce(&Task) -> Result<SavedChat> + Send + 'static> {
        let (parts, prefixes) = (self.parts()?, self.prefixes().clone());
        Ok(move |_: &Task| {
            let file = Arc::new(KvFile::open(&path)?);
            let n_vocab = parts.model.info().n_vocab;
            let foreign = file.ids().iter().any(|&id| id as usize >= n_vocab);
            let same = file.fingerprint() == parts.kv_fingerprint && !foreign;
            let phases = Phases::from_runs(file.runs()).unwrap_or_default();
            let mut note = None;
            if !same {
                let what = "the keys and values are of another model, KV type or kernel, and are computed anew";
                note = Some(format!("{}: {what}", path.display()));
            } else if !file.columns().is_empty() {
                let (ids, scope) = (file.ids()[..file.computed()].to_vec(), scope(file.metadata()));
                let prompt = Prompt { ids, phases, scope, holder };
                let sequence = prompt.sequence(parts.model.as_ref(), Want::From(usize::MAX))?;
                prefixes.keep_file(&sequence, &file, &prompt.holder);
            }
            if let Some(note) = note.as_ref().filter(|_| strict) {
                return Err(Error::InvalidModel(note.clone()));
            }
            let (ids, runs) = (file.ids().to_vec(), if same { file.runs().to_vec() } else { Vec::new() });
            Ok(SavedChat { ids, runs, texts: file.metadata().clone(), note })
        })
    }

    fn check_ids_of_chat(&self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() { Ok(()) } else { self.check_ids(ids) }
    }
}

/// A conversation that goes on.
pub struct Continuation {
    pub text: String,
    pub ids: Vec<u32>,
    /// Of the ids that it began with.
    pub kept: usize,
}

/// The life of a chat. While it is open, its keys and values are evicted last.
pub struct Chat {
    life: Mutex<Option<Arc<()>>>,
    prefixes: Arc<Prefixes>,
    fork_guard: ForkGuard,
}

impl Chat {
    /// For the prompts of the chat.
    pub fn holder(&self) -> Holder {
        match &*lock(&self.life) {
            Some(life) => Holder::Chat(Arc::downgrade(life)),
            None => Holder::Anyone,
        }
    }

    /// Frees what only this chat has a use for.
    pub fn close(&self) {
        if !self.fork_guard.is_forked() && lock(&self.life).take().is_some() {
            self.prefixes.drop_ended_chats();
        }
    }
}

impl Drop for Chat {
    /// Returns at once, as `Engine` does.
    fn drop(&mut self) {
        if !self.fork_guard.is_forked() && lock(&self.life).take().is_some() {
            let prefixes = self.prefixes.clone();
            in_background(move || prefixes.drop_ended_chats());
        }
    }
}

/// The file of a chat.
pub struct SavedChat {
    pub ids: Vec<u32>,
    /// Of the phases of ids with keys and values. Empty if they are those of another model.
    pub runs: Vec<usize>,
    pub texts: BTreeMap<String, String>,
    /// Why the keys and values of the file are of no use.
    pub note: Option<String>,
}

/// The scope that the texts of a file name.
fn scope(texts: &BTreeMap<String, String>) -> Arc<str> {
    Arc::from(texts.get(SCOPE).map_or("", String::as_str))
}

/// The only item of a stream. The stream ends when the task is cancelled.
fn whole(stream: &Stream<Prefill>, task: &Task) -> Result<Table> {
    loop {
        task.check()?;
        match stream.poll()? {
            Poll::Ready(table) => return table.flatten().ok_or(Error::Closed),
            Poll::Pending => stream.wait()?,
        }
    }
}
