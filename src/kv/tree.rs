//! The prefix tree: columns of computed positions, found by the ids and phases of all positions up to them.
//!
//! A node has the ids of one column. A full column may have children, and a shorter one is a leaf. Ids and phases are
//! compared, not hashed, so that a wrong hit cannot be. A hit is exact to the position: of its last column it may use a
//! part. The tree shares its columns with the sequences that are computed. A column that no sequence uses is idle.
//!
//! A model with a window needs only the columns that the next position sees. Columns before them may be missing.
//!
//! Decisions: docs/design/kv.md

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use super::file::KvFile;
use super::phases::Phases;
use super::table::first_seen;
use crate::compute::kernels::PAGE;
use crate::compute::ops::{Column, KvShape};
use crate::error::Result;

/// Keys and values depend on what is computed before them, and on these.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Root {
    /// Whether they are computed with the long rope factors.
    pub long: bool,
    /// Sequences of another scope find nothing.
    pub scope: Arc<str>,
}

/// Positions of a sequence, from its first one on.
#[derive(Copy, Clone)]
pub struct Path<'a> {
    pub root: &'a Root,
    pub ids: &'a [u32],
    pub phases: &'a Phases,
}

/// Whom positions are held for. It decides what is evicted first.
#[derive(Clone, Debug, Default)]
pub enum Holder {
    /// The next prompt that begins with them.
    #[default]
    Anyone,
    /// A chat, until it is dropped.
    Chat(Weak<()>),
    /// They are evicted last.
    Pin,
}

/// The longest held prefix.
pub struct Hit {
    pub length: usize,
    /// Consecutive. The last one has position `length - 1`.
    pub columns: VecDeque<Arc<Column>>,
}

pub struct Tree {
    window: Option<usize>,
    shape: KvShape,
    column_bytes: u64,
    nodes: Vec<Node>,
    /// Nodes that are in no use.
    free: Vec<usize>,
    roots: HashMap<Root, usize>,
    /// Counts lookups and insertions.
    clock: u64,
    /// Columns.
    held: usize,
}

#[derive(Default)]
struct Node {
    parent: Option<usize>,
    /// The ids of its column. A root has none.
    ids: Vec<u32>,
    /// A bit for each id that was decoded.
    decoded: u128,
    /// Whether such an id is in it or before it.
    answered: bool,
    column: Option<Arc<Column>>,
    /// The file that has the column too, and its number there.
    file: Option<(Arc<KvFile>, usize)>,
    children: Vec<usize>,
    /// The clock at the last use.
    used: u64,
    pinned: bool,
    chats: Vec<Weak<()>>,
}

impl Node {
    /// Leading ids that it has in common with a part of a path.
    fn common(&self, ids: &[u32], decoded: u128) -> usize {
        let same = self.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        same.min((self.decoded ^ decoded).trailing_zeros() as usize)
    }

    fn has_data(&self) -> bool {
        self.column.is_some() || self.file.is_some()
    }

    /// What goes first when memory is short.
    fn rank(&self) -> u8 {
        let in_chat = self.chats.iter().any(|chat| chat.strong_count() > 0);
        if self.pinned { 2 } else { u8::from(in_chat) }
    }

    fn hold(&mut self, holder: &Holder) {
        match holder {
            Holder::Anyone => {}
            Holder::Pin => self.pinned = true,
            Holder::Chat(chat) => {
                self.chats.retain(|other| other.strong_count() > 0 && !other.ptr_eq(chat));
                self.chats.push(chat.clone());
            }
        }
    }
}

/// A part of a path that is in one column.
struct Part<'a> {
    start: usize,
    ids: &'a [u32],
    decoded: u128,
}

impl<'a> Path<'a> {
    fn parts(self, length: usize) -> impl Iterator<Item = Part<'a>> {
        (0..length).step_by(PAGE).map(move |start| {
            let ids = &self.ids[start..length.min(start + PAGE)];
            Part { start, ids, decoded: self.phases.bits(start, ids.len()) }
        })
    }
}

impl Tree {
    /// Of a model whose columns have this shape.
    pub fn new(window: Option<usize>, shape: KvShape) -> Self {
        let column_bytes = (PAGE * shape.position_bytes()) as u64;
        let (nodes, free, roots) = (Vec::new(), Vec::new(), HashMap::new());
        Tree { window, shape, column_bytes, nodes, free, roots, clock: 0, held: 0 }
    }

    /// The longest held prefix of at most `most` positions. None if no position is held. An error if a file of them is
    /// damaged, which is then used no more.
    pub fn find(&mut self, path: Path<'_>, most: usize) -> Result<Option<Hit>> {
        let most = most.min(path.ids.len());
        let Some(&(mut node)) = self.roots.get(path.root) else { return Ok(None) };
        let (mut nodes, mut matched) = (Vec::new(), 0);
        for part in path.parts(most) {
            let common = |&child: &usize| self.nodes[child].common(part.ids, part.decoded);
            let with_data = |child: &usize| self.nodes[*child].has_data();
            let children = &self.nodes[node].children;
            // A full column may lack its data and have children that a window needs.
            let best = children.iter().copied().max_by_key(|child| (common(child), with_data(child)));
            let Some((child, common)) = best.map(|child| (child, common(&child))).filter(|(_, common)| *common > 0)
            else {
                break;
            };
            nodes.push(child);
            matched = part.start + common;
            if common < PAGE {
                break;
            }
            node = child;
        }
        let length = self.covered(&nodes, matched);
        if length == 0 {
            return Ok(None);
        }
        let needed = first_seen(self.window, length) / PAGE..length.div_ceil(PAGE);
        self.clock += 1;
        let clock = self.clock;
        let mut columns = VecDeque::new();
        for &node in &nodes[needed] {
            self.nodes[node].used = clock;
            columns.extend(self.column(node)?);
        }
        Ok(Some(Hit { length, columns }))
    }

    /// The column of a node, from its file if it is not in memory.
    fn column(&mut self, node: usize) -> Result<Option<Arc<Column>>> {
        let entry = &mut self.nodes[node];
        if let (None, Some((file, number))) = (&entry.column, &entry.file) {
            match file.column(*number, &self.shape) {
                Ok(column) => {
                    entry.column = Some(Arc::new(column));
                    self.held += 1;
                }
                Err(error) => {
                    entry.file = None;
                    return Err(error);
                }
            }
        }
        Ok(self.nodes[node].column.clone())
    }

    /// The most positions, of `matched`, whose needed columns are all held.
    fn covered(&self, nodes: &[usize], matched: usize) -> usize {
        let mut length = matched;
        while length > 0 {
            let needed = first_seen(self.window, length) / PAGE..length.div_ceil(PAGE);
            let Some(missing) = needed.rev().find(|&page| !self.nodes[nodes[page]].has_data()) else { break };
            length = missing * PAGE; // every longer prefix needs that column
        }
        length
    }

    /// Holds the first `length` positions of a path. `columns`: consecutive ones, that need not begin at position 0.
    pub fn insert<'c>(
        &mut self,
        path: Path<'_>,
        length: usize,
        columns: impl Iterator<Item = &'c Arc<Column>>,
        holder: &Holder,
    ) {
        let length = length.min(path.ids.len()).min(path.phases.len());
        if length == 0 {
            return;
        }
        self.clock += 1;
        let (clock, first) = (self.clock, first_seen(self.window, length));
        let mut columns = columns.peekable();
        let mut node = match self.roots.get(path.root) {
            Some(&root) => root,
            None => {
                let root = self.add(Node::default());
                self.roots.insert(path.root.clone(), root);
                root
            }
        };
        for part in path.parts(length) {
            let child = self.child(node, &part);
            while columns.next_if(|column| column.start() < part.start).is_some() {}
            let column = columns.next_if(|column| column.start() == part.start);
            let entry = &mut self.nodes[child];
            let is_whole = entry.ids.len() == part.ids.len();
            if let Some(column) = column.filter(|_| is_whole && entry.column.is_none()) {
                entry.column = Some(column.clone());
                self.held += 1;
            }
            if part.start + PAGE > first {
                entry.used = clock;
                entry.hold(holder);
            }
            node = child;
        }
    }

    /// Holds the positions of a file that has the first ids of a path.
    pub fn insert_file(&mut self, path: Path<'_>, file: &Arc<KvFile>, holder: &Holder) {
        self.insert(path, file.computed(), [].iter(), holder);
        let Some(mut node) = self.roots.get(path.root).copied() else { return };
        for (number, part) in path.parts(file.computed().min(path.ids.len()).min(path.phases.len())).enumerate() {
            node = self.child(node, &part);
            let entry = &mut self.nodes[node];
            if file.columns().contains(&number) && entry.ids.len() == part.ids.len() {
                entry.file = Some((file.clone(), number));
            }
        }
    }

    /// The child of a node that has the ids of a part, and perhaps more. It is made if there is none.
    fn child(&mut self, parent: usize, part: &Part<'_>) -> usize {
        let children = &self.nodes[parent].children;
        let common = |child: usize| self.nodes[child].common(part.ids, part.decoded);
        if let Some(&child) = children.iter().find(|&&child| common(child) == part.ids.len()) {
            return child;
        }
        // It takes the place of a shorter one, whose positions it has too.
        let shorter = children.iter().copied().find(|&child| common(child) == self.nodes[child].ids.len());
        let answered = self.nodes[parent].answered || part.decoded != 0;
        let (ids, decoded) = (part.ids.to_vec(), part.decoded);
        let mut node = Node { parent: Some(parent), ids, decoded, answered, ..Node::default() };
        if let Some(shorter) = shorter {
            node.chats = std::mem::take(&mut self.nodes[shorter].chats);
            node.pinned = self.nodes[shorter].pinned;
            self.remove(shorter);
        }
        let child = self.add(node);
        self.nodes[parent].children.push(child);
        child
    }

    fn add(&mut self, node: Node) -> usize {
        match self.free.pop() {
            Some(place) => {
                self.nodes[place] = node;
                place
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        }
    }

    /// Removes a node and all after it.
    fn remove(&mut self, node: usize) {
        if let Some(parent) = self.nodes[node].parent {
            self.nodes[parent].children.retain(|&child| child != node);
        }
        let mut removed = vec![node];
        while let Some(node) = removed.pop() {
            let node_data = std::mem::take(&mut self.nodes[node]);
            self.held -= usize::from(node_data.column.is_some());
            removed.extend(node_data.children);
            self.free.push(node);
        }
    }

    /// Drops the column of a node, if it has one. Without a window the nodes after it are of no use then.
    fn evict(&mut self, node: usize) {
        if self.nodes[node].column.is_none() {
            return; // it went with a node before it
        }
        if self.window.is_none() && self.nodes[node].file.is_none() {
            return self.remove(node);
        }
        self.held -= usize::from(self.nodes[node].column.take().is_some());
        self.prune(node);
    }

    /// Removes a node that has neither a column nor children, and its parents likewise.
    fn prune(&mut self, node: usize) {
        let mut next = Some(node);
        while let Some(node) = next {
            let entry = &self.nodes[node];
            if entry.parent.is_none() || entry.has_data() || !entry.children.is_empty() {
                return;
            }
            next = entry.parent;
            self.remove(node);
        }
    }

    /// Idle columns with their rank, time of use and first position.
    fn idle(&self) -> Vec<(u8, u64, usize, usize)> {
        let idle = |(place, node): (usize, &Node)| {
            let column = node.column.as_ref().filter(|column| Arc::strong_count(column) == 1)?;
            Some((node.rank(), node.used, usize::MAX - column.start(), place))
        };
        self.nodes.iter().enumerate().filter_map(idle).collect()
    }

    /// Evicts idle columns until they have at most `limit` bytes: those of prompts first, then those of chats, then the
    /// pinned ones. Among these the least recently used come first, and the last positions before those that they need.
    /// Returns the bytes of those that are left.
    pub fn trim(&mut self, limit: u64) -> u64 {
        let mut idle = self.idle();
        let allowed = (limit / self.column_bytes.max(1)) as usize;
        idle.sort_unstable();
        for (.., place) in &idle[..idle.len().saturating_sub(allowed)] {
            self.evict(*place);
        }
        idle.len().min(allowed) as u64 * self.column_bytes
    }

    /// Drops what is held for chats that have ended and is of no use for prompts: their answers, and what follows them.
    pub fn drop_ended_chats(&mut self) {
        let ended = |node: &Node| !node.chats.is_empty() && node.rank() == 0;
        self.nodes.iter_mut().filter(|node| ended(node)).for_each(|node| node.file = None);
        let mut idle = self.idle();
        idle.retain(|&(.., place)| self.nodes[place].answered && ended(&self.nodes[place]));
        idle.sort_unstable_by_key(|&(_, _, last_first, _)| last_first);
        idle.into_iter().for_each(|(.., place)| self.evict(place));
    }

    /// Bytes of all columns.
    pub fn held_bytes(&self) -> u64 {
        self.held as u64 * self.column_bytes
    }

    /// Bytes of the columns that no sequence uses.
    pub fn idle_bytes(&self) -> u64 {
        self.idle().len() as u64 * self.column_bytes
    }

    /// Positions whose columns are held, in memory or in files of chats.
    pub fn positions(&self) -> usize {
        self.nodes.iter().filter(|node| node.has_data()).map(|node| node.ids.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::kernels::Phase;
    use crate::compute::ops::{KvShape, KvType};
    use crate::kv::table::Table;

    const COLUMN: u64 = 2 * 2 * 2 * PAGE as u64;

    fn shape() -> KvShape {
        KvShape { n_layers: 1, n_head_kv: 1, head_dim: 2, kv_type: KvType::F16, device: None }
    }

    fn root(scope: &str) -> Root {
        Root { long: false, scope: scope.into() }
    }

    fn ids(n: usize, seed: u32) -> Vec<u32> {
        (0..n as u32).map(|i| i ^ seed).collect()
    }

    /// Computes a sequence in a table of its own, and holds it.
    fn hold(tree: &mut Tree, ids: &[u32], phases: &Phases, holder: &Holder) -> Table {
        let mut table = Table::new(&shape(), tree.window);
        for chunk in ids.chunks(PAGE) {
            table.reserve(chunk.len()).unwrap();
            table.commit(chunk.len());
            let path = Path { root: &root(""), ids, phases };
            tree.insert(path, table.len(), table.columns(), holder);
        }
        table
    }

    fn found(tree: &mut Tree, ids: &[u32], phases: &Phases) -> usize {
        let hit = tree.find(Path { root: &root(""), ids, phases }, ids.len()).unwrap();
        let Some(hit) = hit else { return 0 };
        let starts: Vec<usize> = hit.columns.iter().map(|column| column.start()).collect();
        let first = first_seen(tree.window, hit.length) / PAGE;
        let expected: Vec<usize> = (first..hit.length.div_ceil(PAGE)).map(|page| page * PAGE).collect();
        assert_eq!(starts, expected);
        hit.length
    }

    fn tree(window: Option<usize>) -> Tree {
        Tree::new(window, shape())
    }

    #[test]
    fn a_prefix_is_found_to_the_position() {
        let mut tree = tree(None);
        let held = ids(300, 0);
        let prefill = Phases::prefill(500);
        hold(&mut tree, &held, &prefill, &Holder::Anyone);
        assert_eq!((tree.positions(), tree.held_bytes()), (300, 3 * COLUMN));
        for common in 0..=300 {
            let mut other = held.clone();
            other.truncate(common);
            other.extend([9999; 5]);
            assert_eq!(found(&mut tree, &other, &prefill), common);
        }
        let path = Path { root: &root(""), ids: &held, phases: &prefill };
        assert_eq!(tree.find(path, 299).unwrap().map(|hit| hit.length), Some(299));
        assert!(tree.find(Path { root: &root("other"), ..path }, 300).unwrap().is_none(), "another scope");
        assert!(
            tree.find(Path { root: &Root { long: true, ..root("") }, ..path }, 300).unwrap().is_none(),
            "other factors"
        );
    }

    #[test]
    fn a_position_of_another_phase_is_not_found() {
        let mut tree = tree(None);
        let held = ids(300, 0);
        hold(&mut tree, &held, &Phases::from_runs(&[140, 100, 60]).unwrap(), &Holder::Anyone);
        assert_eq!(found(&mut tree, &held, &Phases::prefill(300)), 140);
        assert_eq!(found(&mut tree, &held, &Phases::from_runs(&[140, 90, 70]).unwrap()), 230);
        assert_eq!(found(&mut tree, &held, &Phases::from_runs(&[140, 100, 60]).unwrap()), 300);
    }

    #[test]
    fn sequences_share_what_they_have_in_common() {
        let mut tree = tree(None);
        let prefill = Phases::prefill(1000);
        for seed in 1..=5 {
            let mut held = ids(2 * PAGE, 0);
            held.extend(ids(40, 1000 * seed));
            hold(&mut tree, &held, &prefill, &Holder::Anyone);
            held.extend([7; 3]);
            assert_eq!(found(&mut tree, &held, &prefill), 2 * PAGE + 40);
            hold(&mut tree, &held, &prefill, &Holder::Anyone); // in place of the shorter one
        }
        assert_eq!((tree.positions(), tree.held), (2 * PAGE + 5 * 43, 7));
    }

    #[test]
    fn idle_columns_are_evicted_and_those_in_use_are_not() {
        let mut tree = tree(None);
        let prefill = Phases::prefill(1000);
        let used = hold(&mut tree, &ids(300, 1 << 20), &prefill, &Holder::Anyone);
        hold(&mut tree, &ids(300, 0), &prefill, &Holder::Anyone);
        assert_eq!((tree.idle_bytes(), tree.held_bytes()), (3 * COLUMN, 6 * COLUMN));
        for left in (0..3).rev() {
            tree.trim(left * COLUMN + COLUMN - 1);
            assert_eq!(tree.idle_bytes(), left * COLUMN);
            assert_eq!(found(&mut tree, &ids(300, 0), &prefill), left as usize * PAGE, "the last positions go first");
        }
        assert_eq!(found(&mut tree, &ids(300, 1 << 20), &prefill), 300);
        drop(used);
        tree.trim(0);
        assert_eq!((tree.held_bytes(), tree.positions()), (0, 0));
    }

    #[test]
    fn the_least_recently_used_goes_first_then_chats_then_pins() {
        let mut tree = tree(None);
        let prefill = Phases::prefill(1000);
        let chat = Arc::new(());
        let holders = [Holder::Pin, Holder::Chat(Arc::downgrade(&chat)), Holder::Anyone, Holder::Anyone];
        let held: Vec<Vec<u32>> = (0..4).map(|i| ids(PAGE, i << 20)).collect();
        for (ids, holder) in held.iter().zip(&holders) {
            hold(&mut tree, ids, &prefill, holder);
        }
        assert_eq!(found(&mut tree, &held[2], &prefill), PAGE); // it was used after the last one
        for gone in [3, 2, 1, 0] {
            tree.trim(tree.held_bytes() - COLUMN);
            let left: Vec<usize> = (0..4).filter(|&i| found(&mut tree, &held[i], &prefill) > 0).collect();
            assert_eq!(left, (0..gone).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_answers_of_a_chat_go_with_it_and_its_prompt_stays() {
        for window in [None, Some(200)] {
            let mut tree = tree(window);
            let (chat, other) = (Arc::new(()), Arc::new(()));
            let phases = Phases::from_runs(&[150, 250]).unwrap();
            hold(&mut tree, &ids(400, 0), &phases, &Holder::Chat(Arc::downgrade(&chat)));
            hold(&mut tree, &ids(140, 0), &phases, &Holder::Chat(Arc::downgrade(&other)));
            tree.drop_ended_chats();
            assert_eq!(found(&mut tree, &ids(400, 0), &phases), 400);
            drop(chat);
            tree.drop_ended_chats();
            assert_eq!(found(&mut tree, &ids(400, 0), &phases), 256, "{window:?}: another chat holds a part");
            drop(other);
            tree.drop_ended_chats();
            assert_eq!(found(&mut tree, &ids(400, 0), &phases), PAGE, "{window:?}");
        }
    }

    #[test]
    fn a_window_needs_the_columns_that_the_next_position_sees() {
        let mut tree = tree(Some(200));
        let prefill = Phases::prefill(2000);
        let held = ids(1000, 0);
        hold(&mut tree, &held, &prefill, &Holder::Anyone);
        assert_eq!(tree.held, 8);
        // The columns behind the window of the whole were not used since, and go first.
        tree.trim(3 * COLUMN);
        assert_eq!(found(&mut tree, &held, &prefill), 1000);
        tree.trim(COLUMN);
        assert!(found(&mut tree, &held, &prefill) == 0 && tree.held == 1, "one column is less than a window");
        hold(&mut tree, &held, &prefill, &Holder::Anyone);
        assert_eq!(found(&mut tree, &held[..500], &prefill), 500, "what was evicted is held again");
        tree.trim(0);
        assert!(tree.nodes.iter().all(|node| node.ids.is_empty()), "no ids without columns are left");
    }

    #[test]
    fn a_part_of_a_column_does_not_take_the_place_of_the_whole() {
        let mut tree = tree(Some(200));
        let (prefill, held) = (Phases::prefill(2000), ids(PAGE + 100, 0));
        let table = hold(&mut tree, &held, &prefill, &Holder::Anyone);
        let last = tree.nodes.iter().position(|node| node.ids.len() == 100).unwrap();
        tree.nodes[last].column = None; // as if it were evicted before what follows it
        tree.held -= 1;
        let path = Path { root: &root(""), ids: &held, phases: &prefill };
        tree.insert(path, PAGE + 50, table.columns(), &Holder::Anyone);
        assert_eq!(found(&mut tree, &held, &prefill), PAGE);
        tree.insert(path, PAGE + 100, table.columns(), &Holder::Anyone);
        assert_eq!(found(&mut tree, &held, &prefill), PAGE + 100);
    }

    #[test]
    fn a_decoded_position_is_found_by_its_phase_in_every_column() {
        let mut phases = Phases::default();
        let mut tree = tree(None);
        for i in 0..3 * PAGE {
            phases.push(1, if i % 3 == 0 { Phase::Decode } else { Phase::Prefill });
        }
        hold(&mut tree, &ids(3 * PAGE, 0), &phases, &Holder::Anyone);
        assert_eq!(found(&mut tree, &ids(3 * PAGE, 0), &phases), 3 * PAGE);
    }
}
