//! Rewrites a parsed template: each operation pays for the text it touches, and comparisons see texts without marks.
//!
//! The engine bounds the number of steps, not the cost of one step: forty times `x ~ x` is a terabyte. So, before
//! compiling, operations on text and lists become calls of functions that `jinja.rs` provides (or their operands pass
//! through one). A template cannot write or shadow the names of these functions, such as "~". Raw text becomes an
//! expression, because only expressions pass the formatter. Statements that a chat template does not need are refused.
//! This also leaves the compiler nothing large to fold: `'a' * 100000000` is computed at compile time otherwise.
//!
//! Decisions: docs/design/text.md

use minijinja::machinery::Span;
use minijinja::machinery::ast::{self, BinOpKind, CallArg, Expr, Spanned, Stmt};
use minijinja::value::Value;
use minijinja::{Error, ErrorKind};

use super::marks;

pub(super) const ADD: &str = "+";
pub(super) const MULTIPLY: &str = "*";
pub(super) const CONCAT: &str = "~";
/// `Meter::weigh`, then `marks::read`: for operands whose text decides the result, but is not part of it.
pub(super) const READ: &str = "read!";
/// `Meter::weigh`, `count`, `look` and `plain`: each returns its argument.
pub(super) const WEIGH: &str = "weigh!";
pub(super) const COUNT: &str = "count!";
pub(super) const LOOK: &str = "look!";
pub(super) const PLAIN: &str = "plain!";

/// An `elif` is one deeper than the one before, and so is every `+` of a sum.
const MAX_DEPTH: usize = 200;

type Guarded<T> = Result<T, Error>;

pub(super) fn guard<'a>(template: &Stmt<'a>) -> Guarded<Stmt<'a>> {
    Guard { depth: 0 }.stmt(template)
}

struct Guard {
    depth: usize,
}

fn call<'a>(function: &'static str, args: Vec<Expr<'a>>, span: Span) -> Expr<'a> {
    let expr = Expr::Var(Spanned::new(ast::Var { id: function }, span));
    Expr::Call(Spanned::new(ast::Call { expr, args: args.into_iter().map(CallArg::Pos).collect() }, span))
}

fn syntax(what: &str, span: Span) -> Error {
    Error::new(ErrorKind::SyntaxError, format!("line {}: {what}", span.start_line))
}

/// Refuses a text of the template with a character that could pass for a marked one.
fn check_text(text: &str, span: Span) -> Result<(), Error> {
    match text.chars().find(|c| marks::has_marks(c.encode_utf8(&mut [0; 4]))) {
        Some(c) => Err(syntax(&format!("U+{:X} is not an assigned character", c as u32), span)),
        None => Ok(()),
    }
}

impl Guard {
    fn deeper<T>(&mut self, span: Span, inner: impl FnOnce(&mut Self) -> Guarded<T>) -> Guarded<T> {
        if self.depth == MAX_DEPTH {
            return Err(syntax(&format!("nested more than {MAX_DEPTH} deep"), span));
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn body<'a>(&mut self, body: &[Stmt<'a>]) -> Guarded<Vec<Stmt<'a>>> {
        body.iter().map(|stmt| self.stmt(stmt)).collect()
    }

    fn stmt<'a>(&mut self, stmt: &Stmt<'a>) -> Guarded<Stmt<'a>> {
        macro_rules! node {
            ($variant:ident, $old:expr, $new:expr) => {{
                let span = $old.span();
                Ok(Stmt::$variant(Spanned::new(self.deeper(span, |this| $new(this))?, span)))
            }};
        }
        match stmt {
            Stmt::Template(t) => {
                node!(Template, t, |this: &mut Self| { Ok(ast::Template { children: this.body(&t.children)? }) })
            }
            Stmt::EmitExpr(e) => node!(EmitExpr, e, |this: &mut Self| Ok(ast::EmitExpr { expr: this.expr(&e.expr)? })),
            Stmt::EmitRaw(raw) => {
                let span = raw.span();
                check_text(raw.raw, span)?;
                let expr = Expr::Const(Spanned::new(ast::Const { value: Value::from(raw.raw) }, span));
                Ok(Stmt::EmitExpr(Spanned::new(ast::EmitExpr { expr }, span)))
            }
            Stmt::ForLoop(f) => node!(ForLoop, f, |this: &mut Self| {
                Ok(ast::ForLoop {
                    target: this.names(&f.target)?,
                    iter: this.through(LOOK, &f.iter)?,
                    filter_expr: this.option(&f.filter_expr)?,
                    recursive: f.recursive,
                    body: this.body(&f.body)?,
                    else_body: this.body(&f.else_body)?,
                })
            }),
            Stmt::IfCond(c) => node!(IfCond, c, |this: &mut Self| {
                Ok(ast::IfCond {
                    expr: this.expr(&c.expr)?,
                    true_body: this.body(&c.true_body)?,
                    false_body: this.body(&c.false_body)?,
                })
            }),
            Stmt::WithBlock(w) => node!(WithBlock, w, |this: &mut Self| {
                let pair = |(name, expr): &(Expr<'a>, Expr<'a>)| Ok((this.names(name)?, this.expr(expr)?));
                let assignments = w.assignments.iter().map(pair).collect::<Guarded<_>>()?;
                Ok(ast::WithBlock { assignments, body: this.body(&w.body)? })
            }),
            Stmt::Set(s) => node!(Set, s, |this: &mut Self| {
                let expr = if has_attribute(&s.target) { this.through(PLAIN, &s.expr) } else { this.expr(&s.expr) };
                Ok(ast::Set { target: this.target(&s.target)?, expr: expr? })
            }),
            Stmt::SetBlock(s) => node!(SetBlock, s, |this: &mut Self| {
                let (target, filter) = (this.target(&s.target)?, this.option(&s.filter)?);
                Ok(ast::SetBlock { target, filter, body: this.body(&s.body)? })
            }),
            Stmt::FilterBlock(f) => node!(FilterBlock, f, |this: &mut Self| {
                Ok(ast::FilterBlock { filter: this.expr(&f.filter)?, body: this.body(&f.body)? })
            }),
            Stmt::Macro(m) => node!(Macro, m, |this: &mut Self| this.macro_decl(m)),
            Stmt::CallBlock(c) => node!(CallBlock, c, |this: &mut Self| {
                let call = Spanned::new(this.call(&c.call)?, c.call.span());
                Ok(ast::CallBlock {
                    call,
                    macro_decl: Spanned::new(this.macro_decl(&c.macro_decl)?, c.macro_decl.span()),
                })
            }),
            Stmt::Do(d) => node!(Do, d, |this: &mut Self| {
                Ok(ast::Do { call: Spanned::new(this.call(&d.call)?, d.call.span()) })
            }),
            Stmt::Continue(c) => Ok(Stmt::Continue(Spanned::new(ast::Continue, c.span()))),
            Stmt::Break(b) => Ok(Stmt::Break(Spanned::new(ast::Break, b.span()))),
            Stmt::AutoEscape(s) => Err(syntax("a chat template cannot use autoescape", s.span())),
            Stmt::Block(s) => Err(syntax("a chat template cannot use block", s.span())),
            Stmt::Import(s) => Err(syntax("a chat template cannot use import", s.span())),
            Stmt::FromImport(s) => Err(syntax("a chat template cannot use import", s.span())),
            Stmt::Extends(s) => Err(syntax("a chat template cannot use extends", s.span())),
            Stmt::Include(s) => Err(syntax("a chat template cannot use include", s.span())),
        }
    }

    fn macro_decl<'a>(&mut self, m: &ast::Macro<'a>) -> Guarded<ast::Macro<'a>> {
        let args = m.args.iter().map(|arg| self.names(arg)).collect::<Guarded<_>>()?;
        let defaults = m.defaults.iter().map(|default| self.expr(default)).collect::<Guarded<_>>()?;
        Ok(ast::Macro { name: m.name, args, defaults, body: self.body(&m.body)? })
    }

    /// The target of an assignment: a name, an attribute of a namespace, or several of them.
    fn target<'a>(&mut self, target: &Expr<'a>) -> Guarded<Expr<'a>> {
        match target {
            Expr::List(list) => self.deeper(list.span(), |this| {
                let items = list.items.iter().map(|item| this.target(item)).collect::<Guarded<_>>()?;
                Ok(Expr::List(Spanned::new(ast::List { items }, list.span())))
            }),
            Expr::GetAttr(attr) => {
                let expr = self.expr(&attr.expr)?;
                Ok(Expr::GetAttr(Spanned::new(ast::GetAttr { expr, name: attr.name }, attr.span())))
            }
            Expr::Var(var) => Ok(Expr::Var(Spanned::new(ast::Var { id: var.id }, var.span()))),
            other => Err(syntax("this cannot be assigned to", other.span())),
        }
    }

    /// A target without attributes.
    fn names<'a>(&mut self, target: &Expr<'a>) -> Guarded<Expr<'a>> {
        match has_attribute(target) {
            true => Err(syntax("only `set` can assign to an attribute", target.span())),
            false => self.target(target),
        }
    }

    fn option<'a>(&mut self, expr: &Option<Expr<'a>>) -> Guarded<Option<Expr<'a>>> {
        expr.as_ref().map(|expr| self.expr(expr)).transpose()
    }

    /// `expr`, passed through a function of the meter. Constants are free: they are no longer than the template.
    fn through<'a>(&mut self, function: &'static str, expr: &Expr<'a>) -> Guarded<Expr<'a>> {
        let guarded = self.expr(expr)?;
        let constant = matches!(guarded, Expr::Const(_));
        Ok(if constant { guarded } else { call(function, vec![guarded], expr.span()) })
    }

    fn expr<'a>(&mut self, expr: &Expr<'a>) -> Guarded<Expr<'a>> {
        let span = expr.span();
        self.deeper(span, |this| this.expr_inside(expr, span))
    }

    fn expr_inside<'a>(&mut self, expr: &Expr<'a>, span: Span) -> Guarded<Expr<'a>> {
        Ok(match expr {
            Expr::Var(var) => Expr::Var(Spanned::new(ast::Var { id: var.id }, span)),
            Expr::Const(c) => {
                check_text(c.value.as_str().unwrap_or_default(), span)?;
                Expr::Const(Spanned::new(ast::Const { value: c.value.clone() }, span))
            }
            Expr::Slice(s) => {
                let (start, stop, step) = (self.option(&s.start)?, self.option(&s.stop)?, self.option(&s.step)?);
                let slice = ast::Slice { expr: self.through(COUNT, &s.expr)?, start, stop, step };
                call(COUNT, vec![Expr::Slice(Spanned::new(slice, span))], span)
            }
            Expr::UnaryOp(u) => {
                let negates = matches!(u.op, ast::UnaryOpKind::Neg);
                let op = if negates { ast::UnaryOpKind::Neg } else { ast::UnaryOpKind::Not };
                Expr::UnaryOp(Spanned::new(ast::UnaryOp { op, expr: self.expr(&u.expr)? }, span))
            }
            Expr::BinOp(b) => match b.op {
                BinOpKind::Add => call(ADD, vec![self.expr(&b.left)?, self.expr(&b.right)?], span),
                BinOpKind::Mul => call(MULTIPLY, vec![self.expr(&b.left)?, self.expr(&b.right)?], span),
                BinOpKind::Concat => call(CONCAT, vec![self.expr(&b.left)?, self.expr(&b.right)?], span),
                op @ (BinOpKind::ScAnd
                | BinOpKind::ScOr
                | BinOpKind::Sub
                | BinOpKind::Div
                | BinOpKind::FloorDiv
                | BinOpKind::Rem
                | BinOpKind::Pow) => {
                    let (left, right) = (self.expr(&b.left)?, self.expr(&b.right)?);
                    Expr::BinOp(Spanned::new(ast::BinOp { op, left, right }, span))
                }
                op @ (BinOpKind::Eq
                | BinOpKind::Ne
                | BinOpKind::Lt
                | BinOpKind::Lte
                | BinOpKind::Gt
                | BinOpKind::Gte
                | BinOpKind::In) => {
                    let (left, right) = (self.through(READ, &b.left)?, self.through(READ, &b.right)?);
                    Expr::BinOp(Spanned::new(ast::BinOp { op, left, right }, span))
                }
            },
            Expr::Compare(c) => {
                let op =
                    |op: &ast::CompareOp<'a>| Ok(ast::CompareOp { op: op.op, expr: self.through(READ, &op.expr)? });
                let ops = c.ops.iter().map(op).collect::<Guarded<_>>()?;
                Expr::Compare(Spanned::new(ast::Compare { expr: self.through(READ, &c.expr)?, ops }, span))
            }
            Expr::IfExpr(i) => {
                let (test_expr, true_expr) = (self.expr(&i.test_expr)?, self.expr(&i.true_expr)?);
                let false_expr = self.option(&i.false_expr)?;
                Expr::IfExpr(Spanned::new(ast::IfExpr { test_expr, true_expr, false_expr }, span))
            }
            Expr::Filter(f) => {
                let meter = match f.name {
                    "length" | "count" | "first" | "last" | "default" | "d" => LOOK,
                    "list" | "reverse" | "items" => COUNT,
                    _ => WEIGH,
                };
                let expr = f.expr.as_ref().map(|expr| self.through(meter, expr)).transpose()?;
                Expr::Filter(Spanned::new(ast::Filter { name: f.name, expr, args: self.args(&f.args)? }, span))
            }
            // Tests that look further than at the type pay themselves.
            Expr::Test(t) => {
                let (expr, args) = (self.expr(&t.expr)?, self.args(&t.args)?);
                Expr::Test(Spanned::new(ast::Test { name: t.name, expr, args }, span))
            }
            Expr::GetAttr(a) => {
                Expr::GetAttr(Spanned::new(ast::GetAttr { expr: self.expr(&a.expr)?, name: a.name }, span))
            }
            Expr::GetItem(i) => {
                let (expr, subscript_expr) = (self.through(LOOK, &i.expr)?, self.through(READ, &i.subscript_expr)?);
                Expr::GetItem(Spanned::new(ast::GetItem { expr, subscript_expr }, span))
            }
            Expr::Call(c) => Expr::Call(Spanned::new(self.call(c)?, span)),
            Expr::List(list) => {
                let items = list.items.iter().map(|item| self.expr(item)).collect::<Guarded<_>>()?;
                Expr::List(Spanned::new(ast::List { items }, span))
            }
            Expr::Map(map) => {
                let keys = map.keys.iter().map(|key| self.through(WEIGH, key)).collect::<Guarded<_>>()?;
                let values = map.values.iter().map(|value| self.expr(value)).collect::<Guarded<_>>()?;
                Expr::Map(Spanned::new(ast::Map { keys, values }, span))
            }
        })
    }

    fn call<'a>(&mut self, call: &ast::Call<'a>) -> Guarded<ast::Call<'a>> {
        let expr = match &call.expr {
            // A method works on the value that it is called on.
            Expr::GetAttr(a) => {
                let expr = self.through(COUNT, &a.expr)?;
                Expr::GetAttr(Spanned::new(ast::GetAttr { expr, name: a.name }, a.span()))
            }
            other => self.expr(other)?,
        };
        Ok(ast::Call { expr, args: self.args(&call.args)? })
    }

    fn args<'a>(&mut self, args: &[CallArg<'a>]) -> Guarded<Vec<CallArg<'a>>> {
        let guarded = args.iter().map(|arg| {
            Ok(match arg {
                CallArg::Pos(expr) => CallArg::Pos(self.through(WEIGH, expr)?),
                CallArg::Kwarg(name, expr) => CallArg::Kwarg(name, self.through(WEIGH, expr)?),
                CallArg::PosSplat(expr) => CallArg::PosSplat(self.through(WEIGH, expr)?),
                CallArg::KwargSplat(expr) => CallArg::KwargSplat(self.through(WEIGH, expr)?),
            })
        });
        guarded.collect()
    }
}

fn has_attribute(target: &Expr<'_>) -> bool {
    match target {
        Expr::GetAttr(_) => true,
        Expr::List(list) => list.items.iter().any(has_attribute),
        _ => false,
    }
}
